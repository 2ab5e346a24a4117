"""ragkit: the package behind the companion notebooks on attention distillation.

Seven rooms, in the order in which a question travels: `data`, `attention`, `models`,
`distillation`, `indicators`, `experiment`, `pages`. A room imports only rooms before it."""

from ragkit.errors import RagkitError as RagkitError
