"""Messages where a release cannot be made the champion: which one, which stays, and which others could be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from code_worker.errors import ArtifactError, ArtifactStorageError, PluginError
from code_worker.store import releases

if TYPE_CHECKING:
    from code_worker.plugins import Plugins
    from code_worker.store.releases import Registered

_OFFERED: Final = 3


class _Releases(Protocol):
    """The part of the registry that is needed here; the registry uses this module."""

    def champion(self) -> str | None: ...

    def list(self) -> list[Registered]: ...

    def past_champions(self) -> Sequence[str]: ...


@contextmanager
def explained(target: str, registry: _Releases, plugins: Plugins, *, rolls_back: bool = False) -> Iterator[None]:
    """Adds to why `target` cannot be loaded what can be promoted in its place.

    Raises:
        ArtifactError, PluginError: those of what is done within, longer.
    """
    try:
        yield
    except ArtifactStorageError:
        raise  # the same call may work later
    except (ArtifactError, PluginError) as error:
        found = f"{target}, to which this would roll back, cannot be loaded here: {error}" if rolls_back else error
        raise type(error)(f"{found}. {_what_stays(target, registry, plugins)}") from error


def _what_stays(target: str, registry: _Releases, plugins: Plugins) -> str:
    champion = registry.champion()
    stays = "There is no champion" if champion is None else f"{champion} stays the champion"
    there = {one.info.id: one for one in registry.list() if _could_judge(one, plugins)}
    # What judged once is safer than what never did.
    order = dict.fromkeys((*registry.past_champions(), *there))
    others = [name for name in order if name in there and name not in {target, champion}][:_OFFERED]
    if not others:
        return f"{stays}, and no other release here is ready with all its plugins (`code-worker releases list`)"
    return f"{stays}; ready, with their plugins here: {', '.join(others)} (`code-worker releases promote ID`)"


def _could_judge(release: Registered, plugins: Plugins) -> bool:
    """Returns whether it could judge, as far as can be told without loading it."""
    heads = release.info.manifest.get("heads", {}).values()
    needed = {entry["plugin_head"] for entry in heads}
    return release.info.status == releases.READY and bool(needed) and needed <= plugins.heads().keys()
