# SPDX-License-Identifier: Apache-2.0
"""The gate in front of post-training: simulator and reflector must be good enough to teach.

World-Env's ablations show that with a poor simulator or a poor judge the policy ends below where it started. The gate
compares figures measured on held-out episodes with thresholds, on success and on failure episodes separately, on true
as well as on imagined frames, and with the policy in the loop.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from worldenv_jax.errors import WorldEnvError


class GateRefused(WorldEnvError):
    """The learned world is not good enough to teach; the message has the figures."""


@dataclass(frozen=True)
class GateConfig:
    """Thresholds. Margins are in dB of mean PSNR over the horizon that post-training uses."""

    copy_margin_success: float = 3.0  # simulator above copy-last-frame, success episodes
    copy_margin_failure: float = 1.5  # ... failure episodes
    no_action_margin_success: float = 1.5  # simulator above itself with zero actions, success episodes
    no_action_margin_failure: float = 0.75  # ... failure episodes
    true_auroc: float = 0.9  # reflector on true frames: success against failure frames, at least
    true_false_positive_rate: float = 0.1  # share of failure frames with R > eta, at most
    true_calibration_error: float = 0.15  # expected calibration error, at most
    # Of an episode's highest R, for whether it succeeds. In LIBERO-Object a clock that knows the task ranks frames by
    # 0.94 and episodes by 0.72; reflectors that were little better (0.98 and 0.89) knew nothing of imagined successes.
    true_episode_auroc: float = 0.9
    imagined_auroc: float = 0.85
    imagined_false_positive_rate: float = 0.15
    imagined_calibration_error: float = 0.2
    # Phi between true outcomes and verdicts on the same actions replayed in imagination. Frames can be right nearly
    # everywhere and grasps be guessed: on the tabletop post-training made the policy worse at 0.29, better at 0.40.
    outcome_correlation: float = 0.35
    # Imagined successes of the policy that explored, per true one. Recorded actions do not show what a policy makes of
    # imagined observations: where the hand's angle was another number than in its demonstrations, it was below 0.3.
    policy_success: float = 0.5


@dataclass(frozen=True)
class GateRow:
    """One comparison. `figure` is NaN when it could not be measured; such a row fails."""

    name: str
    figure: float
    threshold: float
    at_least: bool  # True: passes when figure >= threshold; False: when figure <= threshold
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure meets the threshold."""
        return self.figure >= self.threshold if self.at_least else self.figure <= self.threshold

    def to_text(self) -> str:
        """For example "AUROC, imagined frames: 0.71, must be at least 0.85"."""
        measured = "not measured" if math.isnan(self.figure) else f"{self.figure:.3g}{self.unit}"
        bound = "at least" if self.at_least else "at most"
        return f"{self.name}: {measured}, must be {bound} {self.threshold:g}{self.unit}"


@dataclass(frozen=True)
class GateResult:
    """All comparisons, and whether every one of them passed."""

    rows: tuple[GateRow, ...]

    @property
    def passed(self) -> bool:
        """Whether post-training may start."""
        return all(row.passed for row in self.rows)

    def check(self) -> None:
        """Raises GateRefused, with every failed row and the flag that overrides the gate, unless all passed."""
        failed = "; ".join(row.to_text() for row in self.rows if not row.passed)
        if failed:
            raise GateRefused(
                f"the gate refuses post-training: {failed}. Train the simulator or the reflector longer, collect more "
                "exploration, or pass --ignore_gate to go on nevertheless"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of gate.json; a figure that was not measured is null."""
        rows = [{**asdict(row), "figure": _finite(row.figure), "passed": row.passed} for row in self.rows]
        return {"passed": self.passed, "rows": rows}


def evaluate_gate(
    simulator_figures: Mapping[str, Any],
    reflector_figures: Mapping[str, Any],
    outcomes: Mapping[str, Any],
    config: GateConfig,
) -> GateResult:
    """Compares measured figures with the thresholds.

    Args:
      simulator_figures: what `video_quality.open_loop_quality` returns: outcome ("success", "failure") -> predictor
        ("simulator", "copy_last_frame", "no_action") -> {"psnr": dB, ...}.
      reflector_figures: kind of frames ("true", "imagined") -> {"auroc", "false_positive_rate", "calibration_error",
        "episode_auroc"}.
      outcomes: kind of frames -> what `agreement.imagination_agreement` returns for whole held-out episodes;
        "imagined": replayed in imagination; "policy": imagined by the policy that recorded them, from the same starts,
        absent where somebody else did.
      config: thresholds.

    Returns:
      Twelve rows, thirteen with "policy". A missing or null figure counts as not measured, and fails.
    """
    rows = []
    for outcome in ("success", "failure"):
        for baseline, words in (("copy_last_frame", "copy-last-frame"), ("no_action", "zero actions")):
            margin = _figure(simulator_figures, outcome, "simulator", "psnr") - _figure(
                simulator_figures, outcome, baseline, "psnr"
            )
            threshold = getattr(config, f"{baseline.removesuffix('_last_frame')}_margin_{outcome}")
            rows.append(GateRow(f"PSNR above {words}, {outcome} episodes", margin, threshold, True, " dB"))
    for kind in ("true", "imagined"):
        for figure, words, at_least in (
            ("auroc", "AUROC", True),
            ("false_positive_rate", "false-positive rate at eta", False),
            ("calibration_error", "calibration error", False),
        ):
            value = _figure(reflector_figures, kind, figure)
            rows.append(GateRow(f"{words}, {kind} frames", value, getattr(config, f"{kind}_{figure}"), at_least))
    episodes = _figure(reflector_figures, "true", "episode_auroc")
    rows.append(GateRow("AUROC of whole episodes, true frames", episodes, config.true_episode_auroc, True))
    correlation = _figure(outcomes, "imagined", "correlation")
    rows.append(GateRow("correlation of imagined with true outcomes", correlation, config.outcome_correlation, True))
    if "policy" in outcomes:
        imagined, true = (_figure(outcomes, "policy", f"{kind}_success", "mean") for kind in ("imagined", "true"))
        ratio = imagined / true if true > 0.0 else math.nan
        rows.append(GateRow("imagined successes of the policy per true one", ratio, config.policy_success, True))
    return GateResult(tuple(rows))


def _figure(figures: Mapping[str, Any], *path: str) -> float:
    value: Any = figures
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return math.nan if value is None else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
