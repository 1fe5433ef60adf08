"""Every error that curate raises on purpose.

    CurateError
      ConfigError      the recipe file is wrong                  -> mend the YAML or the --set
      SourceError      an input table or pool cannot be read     -> mend ingest.sources
      PlanError        the run cannot work as asked              -> mend what it names, before any worker starts
        WeightsError   a model's file is missing or is not it    -> `curate weights pull`
      StoreError       what lies at rest is not what it must be  -> look at the folder it names
        MissingTable   a table or shard was never committed      -> run the stage that writes it
      StageError       a stage failed on a shard                 -> it names stage, shard, cause and the next act
      ReleaseError     a release is not what its manifest says   -> do not train on it

A bad *sample* is never an error: it is a status on its row.
"""


class CurateError(Exception):
    """Base of all errors raised on purpose; its text says whose fault, where, and the next act."""


class ConfigError(CurateError):
    """The recipe file or a `--set` is wrong."""


class SourceError(CurateError):
    """An input table or pool cannot be read as asked."""


class PlanError(CurateError):
    """The run cannot work as asked; found before any worker starts."""


class WeightsError(PlanError):
    """A model's file is missing, or its sha256 is not the one in the manifest."""


class StoreError(CurateError):
    """What lies in the store breaks an invariant (rows, key order, schema)."""


class MissingTable(StoreError):
    """A table, or a shard of it, was asked for and never committed."""


class StageError(CurateError):
    """A stage failed on a shard."""


class ReleaseError(CurateError):
    """A release differs from its manifest."""
