"""Make a model of a checkpoint that AdelaiDet or MMDetection published: BoxInst or CondInst with ResNet and FPN.

  boxinst import --from adelaidet BoxInst_MS_R_50_1x.pth --out models/boxinst_r50

The model finds objects without boxes (detect). It takes RGB images like any other; the order of the channels and the
normalisation that the checkpoint was trained with are taken care of.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from boxinst.errors import InputError
from jobs import cli, options


@dataclass(frozen=True)
class ImportConfig:
    """Which checkpoint to import, and where to."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .pth or .safetensors file. Nothing in it is run."""
    layout: Annotated[Literal["adelaidet", "mmdet"], tyro.conf.arg(name="from")]
    """Whose checkpoint it is: AdelaiDet's, or MMDetection 3's."""
    out: str
    """Folder or s3:// prefix of the model."""
    classes: tuple[str, ...] = ()
    """Names of the classes in label order, or a file with a name on each line. COCO's 80 when not given."""
    overwrite: bool = False
    """Replace a model that is already in that folder."""

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, read from the file where one is given."""
        if len(self.classes) == 1 and Path(self.classes[0]).is_file():
            lines = Path(self.classes[0]).read_text().splitlines()
            return tuple(line.strip() for line in lines if line.strip())
        return self.classes


def main(argv: Sequence[str]) -> int:
    """Import the checkpoint that ``argv`` names."""
    config = options.parse(ImportConfig, argv, command="import", about=__doc__)
    from boxinst import weights
    from pipelines import storage

    storage.check(config.out)
    if not config.overwrite and next(storage.walk(config.out), None):
        raise InputError("--out", config.out, "It is there already: give another folder, or --overwrite.")
    model, notes = weights.import_checkpoint(config.layout, config.checkpoint, config.names or None)
    with tempfile.TemporaryDirectory() as scratch:
        weights.save(model, scratch)
        storage.upload(scratch, config.out)
    for note in notes:
        print(note)
    network = f"{model.config.backbone}, {cli.count(len(model.config.classes), 'class')}"
    then = f"boxinst evaluate --mode detect --short-side 800 --model {config.out} --shards ..."
    cli.close(f"a model ({network})", config.out, then=then)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["import", *sys.argv[1:]]))
