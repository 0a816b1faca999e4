"""The contract of a sample format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from pipelines.io import WrittenFile
from pipelines.sample import Sample, SampleSpec
from pipelines.storage.location import Location


class Format(ABC):
    """A file format of samples: one sample in files `<directory>/<sample_id><suffix>`, or a shard of them.

    Attributes:
        name: name on the command line and in manifests.
        suffix: suffix of the file that holds the counts.
        suffixes: suffixes of all files that reading a sample needs.
        extra_suffixes: suffixes of further files that `write` makes.
        keys: keys of the contents that `parse` takes, the counts last: `suffixes`, or that of a member.
    """

    name: str
    suffix: str
    suffixes: tuple[str, ...]
    extra_suffixes: tuple[str, ...] = ()
    keys: tuple[str, ...]

    @property
    def written_suffixes(self) -> tuple[str, ...]:
        """Suffixes of all files that `write` makes, in its order."""
        return (*self.extra_suffixes, *self.suffixes)

    @abstractmethod
    def write(self, directory: Location, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write `sample`, each file atomically, the one with the counts last."""

    @abstractmethod
    def parse(
        self,
        path: Location,
        contents: Mapping[str, bytes],
        spec: SampleSpec | None = None,
        *,
        labeled: bool = True,
    ) -> Sample:
        """Parse and fully validate one sample.

        Args:
            path: file that holds the counts, named in errors.
            contents: bytes of the sample by `keys`; the result may be a view of them.
            spec: expected shape; None accepts any.
            labeled: False for counts alone: `contents` need no other than the last of `keys`, and the
                target is UNKNOWN_TARGET.

        Raises:
            DataError: the content is damaged or not of this format.
        """
