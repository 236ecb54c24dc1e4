"""What a method costs on a cluster: GPU-hours and days beside the FLOPs and bytes of `cost`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_miniplm.evaluation.cost import METHODS, OFFLINE, Kind, PlanSetting


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and how well they are used."""

    name: str
    gpus: int
    peak: float
    """FLOP/s of one device."""
    mfu: Mapping[Kind, float]

    def gpu_hours(self, work: Mapping[Kind, float]) -> float:
        """Of so many FLOPs of each kind."""
        return sum(flops / (self.peak * self.mfu[kind]) for kind, flops in work.items()) / 3600


def method_costs(name: str, settings: Sequence[PlanSetting], cluster: Cluster) -> dict[str, Any]:
    """Of one method: all students together, unless it says so."""
    method, first = METHODS[name], settings[0]
    before = method.jobs(first)
    offline = sum(cluster.gpu_hours({OFFLINE[job].kind: flops}) for job, flops in before.items())
    training = sum(cluster.gpu_hours(method.work(each)) for each in settings)
    return {
        "students": [
            {
                "student": each.student.name,
                "training_flops": method.training(each),
                "aligned_tokens": round(
                    each.tokens
                    * method.share(student=each.student.forward, teacher=each.teacher.forward)
                ),
            }
            for each in settings
        ],
        "offline_flops": before,
        "flops_per_student": sum(method.per_student(each, len(settings)) for each in settings)
        / len(settings),
        "training_gpu_hours": training,
        "offline_gpu_hours": offline,
        "gpu_hours": training + offline,
        "wall_hours": (training + offline) / cluster.gpus,
        "storage": method.storage(first),
    }
