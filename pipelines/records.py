"""Which images of an unfinished output are done, told to Ray Data when a run goes on.

Every process of a run loads this module with Ray Data's settings, so it imports nothing that takes long.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager


class Records(IdColumnCheckpointManager):
    """Reads all parts at once. Ray Data's own way is a data job, with processes to start and tasks to run."""

    def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> tuple[Any, int]:
        """The ids of the images that are done, sorted, as Ray's reference to them and their size in bytes.

        Args:
            data_file_dir: where the parts are; those that a killed run has left incomplete are removed.
            data_file_filesystem: of that folder.
        """
        from pipelines import maskrows  # noqa: PLC0415  # the driver alone needs it, and with it torch

        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        ids = maskrows.done(self.checkpoint_path_unwrapped.rstrip("/").rpartition("/")[0], self.filesystem)
        return (ray.put(ids), ids.nbytes) if len(ids) else (None, 0)
