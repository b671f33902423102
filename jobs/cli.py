"""The console script ``boxinst``: finds the command, runs it, and turns errors into words and exit statuses."""

from __future__ import annotations

import difflib
import importlib
import keyword
import os
import sys
from collections.abc import Sequence

from boxinst.errors import InputError
from pipelines import secrets

COMMANDS = {
    "cut": "a COCO file of any length → pieces of a million images, in memory that does not grow",
    "shard": "COCO boxes + images → Parquet shards, every box accounted for",
    "train": "shards → a tracked and registered model, from boxes alone or with some masks",
    "import": "a checkpoint published by AdelaiDet or MMDetection → a model",
    "evaluate": "model × shards → mask AP, mask IoU, consistency, beside two baselines",
    "segment": "model × shards → one mask row for every box",
    "review": "mask rows → a FiftyOne dataset, worst consistency first; verdicts are given in its App",
    "feedback": "verdicts → the next corpus: accepted and edited masks become labels",
    "promote": "candidate against champion → the alias moves, or the candidate is refused",
    "plan": "hours, memory, storage and money of a train or segment command, before it is run",
    "submit": "run any of these commands on a Ray cluster; ask about such a job, stop it",
    "demo": "the whole path at once, on a drawn corpus or on yours, with an HTML report",
}
"""In the order of the path, with what each one makes of what."""

HELP = f"""\
usage: boxinst COMMAND [OPTIONS]     boxinst COMMAND --help     boxinst --version

From box labels to instance masks and a promoted model. The commands, in the order of the path:

{chr(10).join(f"  {name:10}{text}" for name, text in COMMANDS.items())}

Try it:
  boxinst demo                                     everything, a few minutes, no data needed

On your own data:
  boxinst shard    --annotations train.json --images images --out shards/train
  boxinst shard    --annotations val.json --images images --out shards/val
  boxinst train    --recipe nuclei --shards shards/train --val shards/val --name cells
  boxinst segment  --model models:/cells/1 --shards shards/train --out masks/train
  boxinst review   --masks masks/train --shards shards/train --app
  boxinst feedback --out corpus2/train.json
  boxinst promote  --name cells --shards shards/val

Every option has a default or says that it is required; --recipe NAME|FILE sets many at once. Paths may be
folders or s3://bucket/prefix. A model is a folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/PATH.
What the commands keep (tracking, models, runs, cache) lies under BOXINST_HOME, ./boxinst-home by default; what is
large of it under BOXINST_STORE where that is set, which may be s3://bucket/prefix.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``boxinst`` with the words ``argv`` (default: the process's) and return its exit status.

    0 done; 1 done, and the answer is no (a refused promotion); 2 bad input; 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"boxinst {version('boxinst')}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"boxinst: no command {name!r}.{hint} There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    with_secrets = bool(os.environ.get(secrets.NAMES))
    try:
        if with_secrets:
            secrets.load()
        return importlib.import_module(module(name)).main(rest)
    except InputError as error:
        print(f"boxinst {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"boxinst {name}: interrupted. What was finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    finally:
        if with_secrets:
            from pipelines import cluster

            cluster.remove_secrets()


def module(command: str) -> str:
    """The module of a command. Where the command's name is a word of the language, an underscore follows."""
    return f"jobs.{command}_" if keyword.iskeyword(command) else f"jobs.{command}"


def count(number: int, noun: str) -> str:
    """A number and its noun: "1 box", "2 boxes"."""
    ending = "" if number == 1 else "es" if noun.endswith(("x", "s")) else "s"
    return f"{number:,} {noun}{ending}"


def close(made: str, where: str, *, then: str = "") -> None:
    """The last words of a command: what was made, where it is, and the command that goes on from here."""
    print(f"\nMade {made}: {where}")
    if then:
        print(f"Next: {then}")


if __name__ == "__main__":
    sys.exit(main())
