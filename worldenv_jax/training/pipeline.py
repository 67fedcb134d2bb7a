# SPDX-License-Identifier: Apache-2.0
"""The loop of World-Env as stages that can be run, stopped and resumed one by one, in the order of `STAGES`.

Each stage is a function of a `Run` and reads what earlier stages left in the workdir. What has been recorded, trained
or evaluated is not done again; replays, gate and agreement are. The scripts in `experiments/` call one stage each,
`experiments/quickstart.py` all of them.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.envs import make_environment
from worldenv_jax.envs.base import Environment
from worldenv_jax.envs.protocol import protocol_hash
from worldenv_jax.envs.runner import ActFn, Outcome, run_episodes
from worldenv_jax.envs.tabletop import oracle_reflector_fns, stack_states, tabletop_simulator_fns
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.gate import GateResult
from worldenv_jax.evaluation.report import write_report
from worldenv_jax.evaluation.summary import (
    make_summary,
    peak_rss_bytes,
    summary_table,
    write_summary,
)
from worldenv_jax.manifest import write_manifest
from worldenv_jax.overrides import to_dict
from worldenv_jax.params_file import check_params
from worldenv_jax.policy import init_policy
from worldenv_jax.reflector import init_reflector
from worldenv_jax.rollout import RolloutParams
from worldenv_jax.simulator import Kinematics, init_simulator
from worldenv_jax.training import cloning, collecting, evaluating, gating, imagination, reflector_training
from worldenv_jax.training import simulator_training as simulation
from worldenv_jax.training.acting import compile_policy, policy_actor, replay_actor
from worldenv_jax.training.models import Models, from_lists
from worldenv_jax.training.pretrained import complete_config
from worldenv_jax.training.real_trials import real_trials
from worldenv_jax.training.workdir import Workdir, mesh_from_config
from worldenv_jax.types import Array, EpisodeSpec, GeometryFn, Params, Statistics

# Whose success can be measured: finished models, by the names of their evaluations, and what to compare them with.
POLICIES = {
    "before": "policy",
    "self_imitated": "self_imitated",
    "after": "post_trained",
    "after_true": "post_trained_true",
}
REFERENCES = ("replay", "expert")  # one demonstration per task repeated blindly; the scripted expert

AGREEMENT_STARTS = 64  # imagined trajectories that are replayed in the true world


class Run:
    """A config, its workdir, and what is opened on demand.

    Args:
      config: of the experiment.
      folder: made if missing.
      geometry: a frozen geometry encoder, needed where config.simulator.unet.geometry_width is not 0.
      geometry_params: the encoder's parameters; the trained simulator keeps them.

    Raises:
      WorldEnvError: the folder belongs to another config, or the config needs an encoder and none is given.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        folder: str | Path,
        geometry: GeometryFn | None = None,
        geometry_params: Params | None = None,
    ):
        if config.simulator.unet.geometry_width and geometry is None:
            raise WorldEnvError(
                "simulator.unet.geometry_width is not 0: the scripts know no geometry encoder, make the run in Python "
                "by pipeline.Run(config, folder, geometry=your_function)"
            )
        self.config = complete_config(config)
        self.geometry, self.geometry_params = geometry, geometry_params
        self.workdir = Workdir(folder, to_dict(config))
        self._models: tuple[dict[str, Any], Models] | None = None  # and the calibration that they were made of

    @cached_property
    def environment(self) -> Environment:
        """The true world, opened once."""
        return make_environment(self.config.environment)

    @property
    def instructions(self) -> tuple[str, ...]:
        """What each task asks for: as the world says it, or as the imported recordings do."""
        if self.config.environment.name == "recorded":
            return tuple(self.workdir.calibration["instructions"])
        return self.environment.instructions

    @property
    def models(self) -> Models:
        """The models with everything that has been measured on data so far; the same object until more has been.

        Raises:
          WorldEnvError: no demonstrations have been collected.
        """
        numbers = self.workdir.calibration
        if "statistics" not in numbers:
            raise WorldEnvError(f"no statistics in {self.workdir.folder}: run experiments/collect.py first")
        if self._models is None or self._models[0] != numbers:
            self._models = numbers, self._make_models(numbers)
        return self._models[1]

    def _make_models(self, numbers: dict[str, Any]) -> Models:
        config = self.config
        if "latent_scale" in numbers:
            simulator = replace(config.simulator, latent_scale=numbers["latent_scale"])
            config = replace(config, simulator=simulator)
        if "temperature" in numbers:
            reflector = replace(config.reflector, temperature=numbers["temperature"])
            rollout = replace(config.rollout, threshold=numbers["threshold"])
            config = replace(config, reflector=reflector, rollout=rollout)
        statistics = from_lists(Statistics, numbers["statistics"])
        kinematics = from_lists(Kinematics, numbers["kinematics"])
        return Models.make(config, statistics, kinematics, self.instructions, self.geometry)

    def params(self, model: str) -> Params:
        """A finished model's parameters: "simulator", "reflector" or one of the policies, the values of `POLICIES`.

        Raises:
          WorldEnvError: the stage that makes it has not finished, or they belong to another configuration.
        """
        params = self.workdir.params(model)
        own = {name: leaf for name, leaf in params.items() if name != "geometry_encoder"}
        init, config = {
            "simulator": (init_simulator, self.config.simulator),
            "reflector": (init_reflector, self.config.reflector),
        }.get(model, (init_policy, self.config.policy))
        check_params(model, own, _abstract_params(init, config))
        return params

    @cached_property
    def exploration(self) -> tuple[list[Episode], list[Episode]]:
        """(training, held-out) exploration."""
        return collecting.split_exploration(self.workdir.episodes("exploration"), self.config.collect.held_out_fraction)

    @property
    def training_starts(self) -> list[Episode]:
        """An episode from every start that post-training may begin at: of training exploration, and mere starts."""
        starts = one_per_start(self.exploration[0])
        return starts + list(self.workdir.episodes("starts")) if self.config.collect.starts_per_task else starts

    @property
    def calibration_episodes(self) -> list[Episode]:
        """The half of the held-out exploration that temperature and eta are fitted on."""
        return in_memory(self.exploration[1][::2])

    @property
    def test_episodes(self) -> list[Episode]:
        """The other half: the gate, the estimate during post-training, the agreement."""
        return in_memory(self.exploration[1][1::2])

    @property
    def demonstrations(self) -> list[Episode]:
        """Expert episodes."""
        return list(self.workdir.episodes("demonstrations"))

    @property
    def world(self) -> imagination.World:
        """The learned world."""
        models = self.models
        return imagination.World(models.simulator, models.reflector, self.params("simulator"), self.params("reflector"))

    def close(self) -> None:
        """Ends the environment's processes, if it was opened."""
        if "environment" in self.__dict__:
            self.environment.close()


def collect_demonstrations(run: Run) -> None:
    """Expert episodes, statistics, kinematics."""
    with run.workdir.timed("collect_demonstrations"):
        collecting.collect_demonstrations(run.config, run.workdir, run.environment)


def clone_policy(run: Run) -> None:
    """Imitation, then the scale head."""
    run.workdir.save_params("policy", cloning.clone_policy(run.config, run.workdir, run.models, run.demonstrations))


def collect_exploration(run: Run) -> None:
    """The cloned policy's own successes and failures."""
    with run.workdir.timed("collect_exploration"):
        params = run.params("policy")
        collecting.collect_exploration(run.config, run.workdir, run.environment, run.models, params)


def collect_starts(run: Run) -> None:
    """First frames of further starts, for post-training to begin at."""
    with run.workdir.timed("collect_starts"):
        collecting.collect_starts(run.config, run.workdir, run.environment)


def imitate_successes(run: Run) -> None:
    """Cloning anew, on the demonstrations and the successes of exploration that the gate does not need.

    Not in World-Env. With config.post_training.start_from = "self_imitated" post-training goes on from there.

    Raises:
      WorldEnvError: exploration has no success.
    """
    own = cloning.own_successes(run.exploration[0])
    if not own:
        raise WorldEnvError("no training episode of exploration succeeds: there is nothing of its own to imitate")
    print(f"imitating {len(run.demonstrations)} demonstrations and {len(own)} own successes", flush=True)
    stages = ("self_imitation", "self_imitation_scale")
    episodes = run.demonstrations + own
    params = cloning.clone_policy(run.config, run.workdir, run.models, episodes, stages)
    run.workdir.save_params("self_imitated", params)


def train_simulator(run: Run) -> None:
    """Autoencoder, latent scale, the arm's motion, first pictures, denoiser, the arm's motion in imagined pictures.

    All on demonstrations and (unless ablated) exploration.
    """
    config = run.config
    episodes = in_memory(run.demonstrations)
    if config.collect.train_on_exploration:
        episodes += in_memory(run.exploration[0])
    params = simulation.train_autoencoder(config, run.workdir, episodes)
    # EVAC's denoiser knows latents in its own scale, the config's.
    published = config.pretrained.simulator
    scale = config.simulator.latent_scale if published else simulation.latent_scale(config, params, episodes)
    run.workdir.calibrate(latent_scale=scale)
    models = run.models
    if run.geometry_params:
        params = {**params, "geometry_encoder": run.geometry_params}
    if config.simulator.motion_width:
        params = simulation.train_arm_motion(models.config, run.workdir, params, episodes, models.kinematics)
    data = (episodes, models.statistics, models.kinematics)
    if config.simulator.compositor_width:
        params = simulation.train_compositor(models.config, run.workdir, params, *data)
    params = simulation.train_denoiser(models.config, run.workdir, params, *data, run.geometry)
    if config.simulator.motion_width:
        key, chunks = jax.random.key(config.seed + 31), max(config.rollout.num_chunks, simulation.STRETCH_CHUNKS)
        replay = partial(reflector_training.replay_episodes, models, params, episodes, key, chunks)
        params = simulation.train_arm_motion(models.config, run.workdir, params, episodes, models.kinematics, replay)
    run.workdir.save_params("simulator", params)


def train_reflector(run: Run) -> None:
    """Per-frame success on true frames and on the simulator's replays of the same episodes."""
    models, chunks = run.models, run.config.rollout.num_chunks
    episodes = in_memory(run.demonstrations + run.exploration[0])
    key = jax.random.key(run.config.seed + 30)
    episodes += reflector_training.replay_episodes(models, run.params("simulator"), episodes, key, chunks)
    params = reflector_training.train_reflector(models.config, run.workdir, models, episodes, run.instructions)
    true = run.calibration_episodes
    imagined = reflector_training.replay_episodes(models, run.params("simulator"), true, key, chunks)
    run.workdir.calibrate(**reflector_training.calibrate(models.config, models, params, [true, imagined]))
    run.workdir.save_params("reflector", params)


def gate(run: Run) -> GateResult:
    """Measures the learned world on held-out exploration."""
    with run.workdir.timed("gate"):
        params = RolloutParams(*(run.params(name) for name in RolloutParams._fields))
        models = run.models
        return gating.measure_gate(models.config, run.workdir, models, params, run.test_episodes)


def evaluate(run: Run, policy: str, starts: str | None = None, termination: str = "predicate") -> dict[str, Any]:
    """Success of a policy or a reference (a key of `POLICIES` or one of `REFERENCES`); see `evaluating.evaluate`.

    Raises:
      WorldEnvError: its parameters or demonstrations are missing, or the world cannot do it.
    """

    def play(specs: Sequence[EpisodeSpec]) -> Iterator[tuple[int, Outcome]]:
        if policy == "expert":
            if termination != "predicate":
                raise WorldEnvError("the expert ends its episodes itself: evaluate it with --termination=predicate")
            return evaluating.expert_outcomes(run.environment, specs)
        act = _replay_actor(run) if policy == "replay" else _mean_actor(run, policy)
        if termination == "predicate":
            return run_episodes(run.environment, act, specs)
        reflector = run.params("reflector") if termination == "reflector" else None
        return evaluating.termination_player(run.environment, act, termination, run.models, reflector)(specs)

    return evaluating.evaluate(run.config, run.workdir, run.environment, play, policy, starts, termination)


def _mean_actor(run: Run, policy: str) -> ActFn:
    models, key = run.models, jax.random.key(run.config.seed)
    params = run.params(POLICIES[policy])
    mesh = mesh_from_config(run.config.mesh)
    compiled = compile_policy(models.policy(deterministic=True), models.statistics, models.policy_prompts)
    return policy_actor(compiled, params, key, mesh)


def _replay_actor(run: Run) -> ActFn:
    demonstrations = {episode.task: episode for episode in reversed(run.demonstrations)}  # the first of each task
    missing = set(range(run.config.environment.tasks)) - demonstrations.keys()
    if missing:
        raise WorldEnvError(f"no demonstration of tasks {sorted(missing)}: run experiments/collect.py first")
    return replay_actor(lambda spec: demonstrations[spec.task])


def evaluate_before(run: Run) -> None:
    """Success of the cloned policy."""
    evaluate(run, "before")


def post_train(run: Run) -> None:
    """LOOP-PPO in imagination, from the first frames of all training starts."""
    models = run.models
    starts = models.starts(run.training_starts)
    held_out = models.starts(_some(run.test_episodes, run.config.post_training.held_out_starts))
    trials = imagination.imagined_trials(models.config, models, run.world, starts, held_out)
    policy = run.params(run.config.post_training.start_from)
    params = imagination.post_train(models.config, run.workdir, models, trials, policy)
    run.workdir.save_params("post_trained", params)


def post_train_true(run: Run) -> None:
    """The upper bound: the same updates with the true world and the true predicate in place of the learned ones.

    The tabletop, written in JAX, stands in for the simulator; in any other world episodes are run (RIPT's setting).

    Raises:
      WorldEnvError: recordings have no world to act in.
    """
    config, models = run.config, run.models
    episodes = (run.training_starts, _some(run.test_episodes, config.post_training.held_out_starts))
    if config.environment.name == "recorded":
        raise WorldEnvError("recorded episodes have no world to act in: --world=true needs the tabletop or LIBERO")
    if config.environment.name == "tabletop":
        simulator = tabletop_simulator_fns(models.statistics, run.environment.config)
        starts = [
            models.starts(part)._replace(environment=stack_states([episode.environment for episode in part]))
            for part in episodes
        ]
        world = imagination.World(simulator, oracle_reflector_fns(), {}, {})
        trials = imagination.imagined_trials(config, models, world, *starts)
    else:
        trials = real_trials(config, models, run.environment, *episodes)
    policy = run.params(config.post_training.start_from)
    params = imagination.post_train(config, run.workdir, models, trials, policy, "post_train_true")
    run.workdir.save_params("post_trained_true", params)


def measure_agreement(run: Run) -> None:
    """Do imagined outcomes of the post-trained policy hold in the true world?"""
    with run.workdir.timed("agreement"):
        episodes = _some(run.exploration[1], AGREEMENT_STARTS)
        imagination.measure_agreement(
            run.config,
            run.workdir,
            run.models,
            run.world,
            run.params("post_trained"),
            episodes,
            run.environment,
        )


def evaluate_after(run: Run) -> None:
    """Success of the post-trained policy on the same starts."""
    evaluate(run, "after")


def report(run: Run) -> None:
    """summary.json, the table, report.html."""
    workdir, config = run.workdir, run.config
    before, after = evaluate(run, "before"), evaluate(run, "after")
    summary = make_summary(
        success_before=before["success"],
        success_after=after["success"],
        stages=workdir.seconds,
        config=to_dict(config),
        seed=config.seed,
        protocol_hash=before["protocol_hash"],
        peak_rss=peak_rss_bytes(),
        paired=evaluating.compare(before, after),
        variant=config.variant,
    )
    write_summary(workdir.folder, summary)
    path = write_report(workdir.folder)
    print(summary_table(summary))
    print(f"report: {path}")


# In this order. Each may be skipped when its results are there; `stages_of` says which a run has.
STAGES: dict[str, Callable[[Run], object]] = {
    stage.__name__: stage
    for stage in (
        collect_demonstrations,
        clone_policy,
        collect_exploration,
        collect_starts,
        imitate_successes,
        train_simulator,
        train_reflector,
        gate,
        evaluate_before,
        post_train,
        measure_agreement,
        evaluate_after,
        report,
    )
}


def stages_of(config: ExperimentConfig) -> tuple[str, ...]:
    """Names of the stages, in order, without self-imitation and mere starts where the config has none."""
    wanted = {
        "imitate_successes": config.post_training.start_from == "self_imitated",
        "collect_starts": config.collect.starts_per_task > 0,
    }
    return tuple(name for name in STAGES if wanted.get(name, True))


def stages_after_pretrained(run: Run) -> tuple[str, ...]:
    """Puts the shipped policy, simulator and reflector of this world into the workdir; the stages that remain.

    Without exploration in the simulator's data, it is trained here: the shipped one has seen exploration.

    Raises:
      WorldEnvError: nothing is shipped for this world.
    """
    source = resources.files("worldenv_jax") / "assets" / "pretrained" / run.config.environment.name
    if not source.is_dir():
        raise WorldEnvError(f"no trained models are shipped for {run.config.environment.name!r}: pass --from_scratch")
    with resources.as_file(source) as folder:
        (run.workdir / "params").mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.safetensors"):
            shutil.copyfile(path, run.workdir / "params" / path.name)
        shutil.copyfile(folder / "calibration.json", run.workdir / "calibration.json")
    replaced = {"clone_policy", "train_reflector"}
    if run.config.collect.train_on_exploration:
        replaced |= {"train_simulator"}
        if run.config.post_training.start_from == "policy":  # self-imitation learns from them
            replaced |= {"collect_demonstrations"}
    return tuple(name for name in stages_of(run.config) if name not in replaced)


def start(run: Run) -> None:
    """Makes the folder with config and manifest, and says where the run is."""
    run.workdir.save_config()
    rules = None if run.config.environment.name == "recorded" else protocol_hash(run.environment.protocol)
    write_manifest(run.workdir.folder, to_dict(run.config), seed=run.config.seed, protocol_hash=rules)
    print(f"workdir {run.workdir.folder}", flush=True)


@cache
def _abstract_params(init: Callable[[Any, Array], Params], config: Any) -> Params:
    """Shapes of what `init` makes for a config; nothing is computed."""
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


def in_memory(episodes: list[Episode]) -> list[Episode]:
    """The same episodes with decoded images."""
    return [replace(episode, images=np.asarray(episode.images[:])) for episode in episodes]


def one_per_start(episodes: list[Episode]) -> list[Episode]:
    """The first try from every start."""
    return list({episode.spec._replace(sample=0): episode for episode in reversed(episodes)}.values())[::-1]


def _some(episodes: list[Episode], count: int) -> list[Episode]:
    """`count` episodes spread evenly over the list (all tasks), or all of them."""
    rows = np.unique(np.linspace(0, len(episodes) - 1, min(count, len(episodes))).round().astype(int))
    return [episodes[row] for row in rows]
