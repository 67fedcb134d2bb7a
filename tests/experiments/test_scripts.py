# SPDX-License-Identifier: Apache-2.0
"""Every script through its real main on the debug preset: two steps, then resumed to four, equal to four at once."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from script_runs import run

from worldenv_jax.configs import get_config
from worldenv_jax.data.rlds import add_episodes, open_episodes
from worldenv_jax.envs.base import EpisodeError, split_slots
from worldenv_jax.envs.tabletop import TabletopConfig, TabletopEnvironment
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.gate import GateRefused
from worldenv_jax.metrics import read_json_lines
from worldenv_jax.params_file import load_params, save_params
from worldenv_jax.training import pipeline
from worldenv_jax.training.judge_quality import judge_quality
from worldenv_jax.types import EpisodeSpec

MODELS = ("policy", "simulator", "reflector", "post_trained")
# Where a stage of one or two phases is stopped: in the middle of each phase, before the next one has begun.
STOPS = {
    "clone_policy": (("cloning.steps=2", "scale_head.steps=0"), ("scale_head.steps=2",)),
    "train_simulator": (("autoencoder.steps=2", "denoiser.steps=0"), ("denoiser.steps=2",)),
    "train_reflector": (("reflector_training.steps=2",),),
    "post_train": (("post_training.iterations=2",),),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """All stages without a stop, by the quickstart."""
    workdir = tmp_path_factory.mktemp("straight")
    run("quickstart", workdir, "--from_scratch", "--ignore_gate")
    return workdir


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, straight):
    """Each training stage stopped after two steps and resumed to four."""
    workdir = tmp_path_factory.mktemp("resumed")

    def stop_and_resume(script, *arguments):
        for overrides in STOPS[script]:
            run(script, workdir, *arguments, *(f"--set={override}" for override in overrides))
        run(script, workdir, *arguments)

    run("collect", workdir, "--what=demonstrations")
    stop_and_resume("clone_policy")
    run("collect", workdir, "--what=exploration")  # depends on the finished policy
    stop_and_resume("train_simulator")
    stop_and_resume("train_reflector")
    stop_and_resume("post_train", "--ignore_gate")
    return workdir


@pytest.mark.parametrize("model", MODELS)
def test_resumed_equals_straight_to_the_bit(straight, resumed, model):
    assert_same_parameters(*(load_params(w / "params" / f"{model}.safetensors") for w in (straight, resumed)))


def test_post_training_with_a_critic_resumes_to_the_bit(straight, tmp_path):
    settings = ("critic.updates=2", "critic.warmup=1", "held_out_samples=2")
    results = []
    for name, stops in (("at_once", (4,)), ("stopped", (2, 4))):
        another = shutil.ignore_patterns("config.json", "manifest.json", "post_train*")
        shutil.copytree(straight, tmp_path / name, ignore=another)
        for iterations in stops:
            changes = (f"--set=post_training.{change}" for change in (*settings, f"iterations={iterations}"))
            run("post_train", tmp_path / name, "--ignore_gate", *changes)
        results.append(load_params(tmp_path / name / "params" / "post_trained.safetensors"))
        rows = read_json_lines(tmp_path / name / "metrics" / "post_train.jsonl")
        assert [row["step"] for row in rows if "critic_loss" in row] == [1, 2, 3, 4]
        assert [row["step"] for row in rows if "updates" in row] == [2, 3, 4]  # first the critic alone learns
    assert_same_parameters(*results)


def assert_same_parameters(first, second):
    first, second = flatten_dict(first), flatten_dict(second)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg="/".join(name))


def test_self_imitation_resumes_to_the_bit_and_the_claim_goes_on_from_it(straight, tmp_path, monkeypatch):
    """The expert's episodes stand for exploration, which this clone never brings to an end."""
    claim = importlib.import_module("claim")
    at_once, stopped = tmp_path / "full_seed0", tmp_path / "stopped"
    for folder in (at_once, stopped):
        for part in ("data/demonstrations", "params", "calibration.json"):
            copy = shutil.copytree if (straight / part).is_dir() else shutil.copyfile
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            copy(straight / part, folder / part)
        expert = open_episodes(straight / "data/demonstrations")
        add_episodes(folder / "data/exploration", [replace(e, seed=n) for e in expert for n in range(4)])
        (folder / "params" / "post_trained.safetensors").unlink()
    start = "--set=post_training.start_from=self_imitated"
    monkeypatch.setattr(claim, "LEARNED_WORLD", ("imitate_successes",))
    run("claim", tmp_path, "--ignore_gate", "--upper_bound=false", start, "--set=post_training.iterations=0")
    for overrides in STOPS["clone_policy"]:
        run("imitate_successes", stopped, start, *(f"--set={override}" for override in overrides))
    run("imitate_successes", stopped, start)
    load = lambda folder, name: load_params(folder / "params" / f"{name}.safetensors")
    imitated = load(at_once, "self_imitated")
    assert_same_parameters(imitated, load(stopped, "self_imitated"))
    assert_same_parameters(imitated, load(at_once, "post_trained"))  # no update was made
    with pytest.raises(AssertionError):
        assert_same_parameters(imitated, load(at_once, "policy"))
    rows = json.loads((tmp_path / "claim.json").read_text())["table"]
    assert [row["variant"] for row in rows] == [
        "full, imitating its own successes, shifted starts",
        "full, in imagination, shifted starts",
    ]


def test_a_finished_run_is_read_for_its_own_config_only(straight):
    quickstart, config = importlib.import_module("quickstart"), get_config("debug")
    assert quickstart.finished_summary(config, straight)["seed"] == 0
    assert quickstart.finished_summary(replace(config, seed=1), straight) is None
    assert quickstart.finished_summary(config, straight / "nothing") is None


def test_the_claim_evaluates_every_policy_on_the_same_starts(straight, tmp_path, monkeypatch):
    """With a gate that passes and one that refuses: then the cloned policy is the result."""
    claim = importlib.import_module("claim")
    assert set(claim.LEARNED_WORLD) < set(pipeline.STAGES)
    monkeypatch.setattr(claim, "LEARNED_WORLD", ())  # the learned world is there
    shutil.copytree(straight, tmp_path / "full_seed0")
    run("claim", tmp_path, "--ignore_gate")
    content = json.loads((tmp_path / "claim.json").read_text())
    assert [row["variant"] for row in content["table"]] == [
        "full, in imagination, shifted starts",
        "full, in the true world, shifted starts",
    ]
    folder = tmp_path / "full_seed0"
    results = {
        name: json.loads((folder / "evaluation" / f"{name}.json").read_text()) for name in ("before", "after_true")
    }
    assert content["table"][1]["before"]["mean"] == results["before"]["success"]["mean"]
    assert content["table"][1]["after"]["mean"] == results["after_true"]["success"]["mean"]
    run("claim", tmp_path, "--upper_bound=false")  # models that learned nothing do not pass the gate
    content = json.loads((tmp_path / "claim.json").read_text())
    assert not content["runs"][0]["gate_passed"]
    assert (
        content["runs"][0]["paired"]["in imagination, shifted starts"]["same"]
        == results["before"]["success"]["episodes"]
    )


def test_suites_are_of_libero(tmp_path):
    with pytest.raises(WorldEnvError, match="the world is tabletop"):
        run("collect", tmp_path, "--suites=libero_object")
    with pytest.raises(WorldEnvError, match="the world is tabletop"):
        run("claim", tmp_path, "--suite=libero_object")


def test_what_a_run_leaves(straight):
    summary = json.loads((straight / "summary.json").read_text())
    for name in ("success_before", "success_after"):
        assert set(summary[name]) == {"mean", "low", "high", "episodes"} and summary[name]["episodes"] == 4
    assert {"stages", "seconds", "peak_rss_bytes", "config", "seed", "protocol_hash"} <= set(summary)
    assert {"clone_policy", "denoiser", "reflector", "post_train", "evaluate_after"} <= set(summary["stages"])
    for stage, metric in {
        "clone_policy": "l1_gripper",
        "scale_head": "scale",
        "autoencoder": "psnr",
        "denoiser": "v_error",
        "reflector": "accuracy",
        "post_train": "reward",
    }.items():
        rows = read_json_lines(straight / "metrics" / f"{stage}.jsonl")
        if stage == "post_train":
            assert rows[0]["step"] == 0 and "held_out_reward" in rows.pop(0)  # the cloned policy's
        assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(metric in row for row in rows), stage
        assert list((straight / "metrics" / "tensorboard" / stage).iterdir())
    gate = json.loads((straight / "gate.json").read_text())
    assert len(gate["rows"]) == 13
    assert set(json.loads((straight / "agreement.json").read_text())["counts"]) >= {"false_success", "both_failure"}
    assert list((straight / "pictures").glob("*.png"))
    page = (straight / "report.html").read_text()
    assert "data:image" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_judge_beside_the_bare_model(straight):
    """The trained one has the gate's figures; the bare one is the network before training, asked for yes or no."""
    run = pipeline.Run(get_config("debug"), straight)
    params, known = (run.params("simulator"), run.params("reflector")), run.demonstrations + run.exploration[0]
    rows = judge_quality(run.models, *params, run.test_episodes, known)
    run.close()
    assert [(row["judge"], row["frames_of"]) for row in rows] == [
        ("trained", "true"), ("trained", "imagined"), ("bare", "true"), ("bare", "imagined"),
        ("clock", "none"),
    ]  # fmt: skip
    gate = json.loads((straight / "gate.json").read_text())["reflector"]
    for row in rows[:2]:
        assert row["calibration_error"] == gate[row["frames_of"]]["calibration_error"]
        assert row["frames"] == sum(task["frames"] for task in gate["true"]["per_task"].values())
    assert rows[2]["calibration_error"] != rows[0]["calibration_error"] and rows[2]["threshold"] == 0.5


def test_the_report_names_its_protocol(straight):
    evaluation = json.loads((straight / "evaluation" / "after.json").read_text())
    assert evaluation["protocol_hash"] in (straight / "report.html").read_text()


def test_evaluate_and_imagine(straight, capsys):
    run("evaluate", straight, "--policy=before")
    assert "all tasks" in capsys.readouterr().out
    run("imagine", straight, "--policy=before", "--count=2")
    dreams = open_episodes(straight / "data" / "imagined")
    assert len(dreams) == 2 and dreams[0].actor == "imagined"
    assert dreams[0].images.shape[0] == dreams[0].num_steps + 1


def test_imagine_refuses_the_simulator_of_another_config_and_writes_nothing(straight, tmp_path):

    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    params = load_params(workdir / "params" / "simulator.safetensors")
    params["autoencoder"].pop("quant")
    save_params(workdir / "params" / "simulator.safetensors", params)
    shutil.rmtree(workdir / "data" / "imagined", ignore_errors=True)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(
        WorldEnvError, match="simulator's parameters belong to another configuration: autoencoder/quant/"
    ):
        run("imagine", workdir, "--policy=before", "--count=2")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_imagine_without_a_run_writes_nothing(tmp_path):

    with pytest.raises(WorldEnvError, match=r"collect\.py"):
        run("imagine", tmp_path)
    with pytest.raises(WorldEnvError, match="the scripts know no geometry encoder"):
        run("imagine", tmp_path, "--set=simulator.unet.geometry_width=8")
    assert not list(tmp_path.iterdir())


def without_evaluations(straight: Path, folder: Path) -> Path:
    """A copy of a finished run that has not been evaluated."""
    shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("evaluation"))
    return folder


def test_references_stand_beside_a_policy_on_the_same_starts(straight, tmp_path, capsys):
    workdir = without_evaluations(straight, tmp_path / "run")
    assert run("evaluate", workdir, "--policy=before,replay,expert") == 0
    names = ("before", "replay", "expert")
    results = {name: json.loads((workdir / "evaluation" / f"{name}.json").read_text()) for name in names}
    episodes = {name: [(row["task"], row["seed"]) for row in r["episodes"]] for name, r in results.items()}
    assert episodes["before"] == episodes["replay"] == episodes["expert"] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert len({result["protocol_hash"] for result in results.values()}) == 1

    environment = TabletopEnvironment(TabletopConfig(image_size=32), num_slots=4)
    specs = [EpisodeSpec(task, seed, "test") for task, seed in episodes["expert"]]
    for row, episode in zip(results["expert"]["episodes"], environment.expert_episodes(specs, 0.0)):
        assert (row["success"], row["steps"]) == (episode.succeeded, episode.first_success or environment.max_steps)
    recorded = {episode.task: episode.actions for episode in open_episodes(workdir / "data" / "demonstrations")}
    limit = environment.max_steps
    actions = np.stack([np.pad(recorded[spec.task], ((0, limit), (0, 0)))[:limit] for spec in specs])
    for row, spec in zip(actions, specs):
        row[len(recorded[spec.task]) :, 6] = recorded[spec.task][-1, 6]
    environment.reset(range(4), specs)
    success = environment.step(range(4), actions, every_frame=False).success
    assert [row["success"] for row in results["replay"]["episodes"]] == success.any(1).tolist()

    gained = sum(b["success"] > e["success"] for b, e in zip(*(results[n]["episodes"] for n in ("before", "expert"))))
    assert f"before against expert: gained {gained}, lost" in capsys.readouterr().out


def test_recordings_replay_to_their_success_unless_a_convention_is_wrong(straight, capsys, monkeypatch):
    assert run("replay", straight) == 0 and run("replay", straight, "--recordings=exploration") == 0
    output = capsys.readouterr().out
    assert "2 of 2 recorded demonstrations" in output and "8 of 8 recorded exploration" in output
    step = TabletopEnvironment.step
    turned = np.array([1, 1, 1, 1, 1, 1, -1], np.float32)  # the gripper opens where it closed
    monkeypatch.setattr(TabletopEnvironment, "step", lambda self, slots, a, every: step(self, slots, a * turned, every))
    assert run("replay", straight) == 1
    assert "replayed: failure" in capsys.readouterr().out


def test_a_task_that_crashes_is_an_error_and_never_0_percent(straight, tmp_path, capsys, monkeypatch):
    workdir = without_evaluations(straight, tmp_path / "run")
    reset = TabletopEnvironment.reset

    def crashing_reset(self, slots, specs):
        done = split_slots(slots, reset(self, slots, specs))
        failed = {slot: "no such table" for slot, spec in zip(slots, specs) if spec.task == 1}
        raise EpisodeError(failed, {slot: frames for slot, frames in done.items() if slot not in failed})

    monkeypatch.setattr(TabletopEnvironment, "reset", crashing_reset)
    assert run("evaluate", workdir, "--policy=before") == 1
    output = capsys.readouterr().out
    assert "not measured" in output and "2 of 2 episodes could not be run, the first: no such table" in output
    result = json.loads((workdir / "evaluation" / "before.json").read_text())
    whole = json.loads((straight / "evaluation" / "before.json").read_text())
    assert result["errors"] == 2 and result["success"]["episodes"] == 2
    assert result["per_task"][0] == whole["per_task"][0] and result["episodes"][::2] == whole["episodes"][::2]
    assert result["per_task"][1] == {"mean": None, "low": None, "high": None, "episodes": 0, "errors": 2}
    assert [row["success"] for row in result["episodes"][1::2]] == [None, None]


def test_results_do_not_depend_on_the_number_of_slots(straight, tmp_path):
    whole = json.loads((straight / "evaluation" / "before.json").read_text())
    for slots in (1, 3):
        workdir = without_evaluations(straight, tmp_path / str(slots))
        run("evaluate", workdir, "--policy=before", f"--set=environment.slots={slots}")
        assert json.loads((workdir / "evaluation" / "before.json").read_text()) == whole


def test_the_reflector_may_end_episodes(straight, tmp_path):
    workdir = without_evaluations(straight, tmp_path / "run")
    calibration = json.loads((workdir / "calibration.json").read_text())
    results = {}
    for threshold in (-1.0, 2.0):  # exceeded by the first frame, and by none
        (workdir / "calibration.json").write_text(json.dumps(calibration | {"threshold": threshold}))
        run("evaluate", workdir, "--policy=before,replay", "--termination=reflector")
        saved = workdir / "evaluation" / "before_reflector.json"
        results[threshold] = json.loads(saved.read_text())
        saved.unlink()
    run("evaluate", workdir, "--policy=before", "--termination=limit")
    limit = json.loads((workdir / "evaluation" / "before_limit.json").read_text())
    assert [row["steps"] for row in results[-1.0]["episodes"]] == [1] * 4
    assert results[2.0]["episodes"] == limit["episodes"] and {row["steps"] for row in limit["episodes"]} == {24}
    usual = json.loads((straight / "evaluation" / "before.json").read_text())
    assert len({r["protocol_hash"] for r in (usual, limit, results[2.0])}) == 3


@pytest.mark.parametrize(
    "script,argument,message",
    [
        ("evaluate", "--policy=befor", "expected before, self_imitated, after, after_true, replay, expert"),
        ("evaluate", "--starts=official", "tabletop has no official starts"),
        ("imagine", "--policy=expert", "expected before, self_imitated, after, after_true"),
        ("imagine", "--policy=before,after", "one policy imagines at a time"),
    ],
)
def test_what_a_world_or_a_script_cannot_do_is_one_line(straight, script, argument, message):
    with pytest.raises(WorldEnvError, match=message):
        run(script, straight, argument)


def test_a_refusing_gate_stops_with_its_figures(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(WorldEnvError, match="the gate refuses post-training: PSNR above .*--ignore_gate"):
        run("post_train", tmp_path / "run")


def test_a_table_goes_on_after_a_refusal(straight, tmp_path, capsys, monkeypatch):
    """The cloned policy stands in it twice."""
    quickstart = importlib.import_module("quickstart")
    shutil.copytree(straight, tmp_path / "binary_judge_seed0", ignore=shutil.ignore_patterns("summary.json"))
    config = json.loads((straight / "config.json").read_text())
    config["variant"], config["rollout"]["reward"] = "binary_judge", "binary"
    (tmp_path / "binary_judge_seed0" / "config.json").write_text(json.dumps(config))

    def refuse(config, folder):
        raise GateRefused("not good enough")

    monkeypatch.setattr(quickstart, "run_once", refuse)
    run("quickstart", tmp_path, "--variants=binary_judge")
    row = json.loads((tmp_path / "aggregate.json").read_text())[0]
    before = json.loads((straight / "evaluation" / "before.json").read_text())
    assert row["refused"] == [0] and row["after"] == row["before"]
    assert row["before"]["mean"] == before["success"]["mean"]
    assert "binary_judge_seed0: not good enough" in capsys.readouterr().out


def test_ablations_stand_beside_the_full_loop(straight, tmp_path, monkeypatch):
    quickstart = importlib.import_module("quickstart")
    for name in ("full_seed0", "full_seed1", "binary_judge_seed1"):
        (tmp_path / name / "evaluation").mkdir(parents=True)
        shutil.copyfile(straight / "evaluation" / "after.json", tmp_path / name / "evaluation" / "after.json")
    result = json.loads((straight / "evaluation" / "after.json").read_text())
    for row in result["episodes"]:
        row["success"] = not row["success"]
    won = sum(row["success"] for row in result["episodes"])
    (tmp_path / "binary_judge_seed1" / "evaluation" / "after.json").write_text(json.dumps(result))
    monkeypatch.setattr(quickstart, "FLAGS", SimpleNamespace(variants=["full", "binary_judge"], seeds=2))
    (line,) = quickstart.against_full(tmp_path)
    assert line.startswith(f"binary_judge against full, seed 1: gained {won}, lost {len(result['episodes']) - won}: ")


def test_another_config_is_refused(straight):
    with pytest.raises(WorldEnvError, match=r"policy.head_width: 32, now 64"):
        run("clone_policy", straight, "--set=policy.head_width=64")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--config=tabeltop",), "did you mean 'tabletop'"),
        (("--set=policy.chunks=8",), "policy.chunk"),
        (("--set=cloning.steps=many",), "cloning.steps"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, arguments, message):
    with pytest.raises(WorldEnvError, match=message):
        run("clone_policy", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_stage_without_its_input_says_what_to_run(tmp_path):
    with pytest.raises(WorldEnvError, match=r"collect\.py"):
        run("clone_policy", tmp_path)
