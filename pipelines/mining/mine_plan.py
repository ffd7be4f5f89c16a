"""What ``crem mine`` writes first into its output: what the parts there are of. Other work there is refused."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import JsonValue

from crem.errors import ConfigError
from pipelines.tables.json_file import JsonFile
from pipelines.tables.storage import Folder, JobKind

__all__ = ["MinePlan", "start_or_resume"]


class MinePlan(JsonFile):
    """What the parts in an output folder are of."""

    FILE: ClassVar[str] = "plan.json"

    kind: Literal[JobKind.MINE] = JobKind.MINE
    source: str
    source_id: int
    """``content_id`` of the manifest of the tables."""
    model: str
    fingerprint: str
    chorus_tokens: int | None
    vectors: tuple[str, ...] = ()
    """Where vectors were taken from."""
    exact: bool = True
    """Whether none of them was rounded."""
    settings: dict[str, JsonValue]


def start_or_resume(target: Folder, plan: MinePlan) -> None:
    """Write the plan into a new output folder, or see that it is the same.

    Raises:
        ConfigError: the work there is of other tables, another model or other settings.
    """
    earlier = MinePlan.read(target)
    if earlier is None:
        if target.exists(MinePlan.FILE):
            raise ConfigError(f"{target.uri}/{MinePlan.FILE} is damaged; choose another --out")
        plan.write(target)
        return
    same = {"format", "model", "vectors"}  # the same model, or the same vectors, may stand at another place
    before, now = (p.model_dump(mode="json", exclude={"settings", *same}) | p.settings for p in (earlier, plan))
    if changed := [name for name in now if before.get(name) != now[name]]:
        name = changed[0]
        raise ConfigError(
            f"{target.uri} was begun with another {name}: {before.get(name)!r}, and now it is {now[name]!r}; choose "
            "another --out, or the settings of then"
        )
