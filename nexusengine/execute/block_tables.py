"""Block tables that stay on the device: a step brings the entries that are new, and picks its rows there."""

from __future__ import annotations

import numpy as np
import torch

from nexusengine.execute.batch import StepBatch
from nexusengine.execute.staging import Staging

_UNKNOWN = -1


class DeviceTables:
    """The block tables of all slots on a device.

    Row 0 is that of rows of padding, all null blocks; slot s has row s + 1. The device works in order, so that a step
    in flight has read its tables before the next entries come.

    Args:
        device: where they are.
        columns: blocks of the longest sequence.
    """

    def __init__(self, device: torch.device, columns: int) -> None:
        self._device = device
        self._staging = Staging(device)
        self._columns = columns
        self._hold(0, columns)

    def update(self, batch: StepBatch, block_size: int) -> int:
        """Bring the entries that a step reads and the device does not have.

        Args:
            batch: of the step; where it does not tell about releases, all its rows' entries are brought.
            block_size: tokens a block.

        Returns:
            The number of entries that were written.
        """
        tables, slots = batch.block_tables, batch.slots
        if len(self._sent) < len(tables) or self._columns < tables.shape[1]:
            self._hold(len(tables), max(self._columns, tables.shape[1]))
        used = -(-(batch.starts + batch.counts) // block_size)
        releases = np.full(len(slots), _UNKNOWN) if batch.releases is None else batch.releases[slots]
        known = (releases != _UNKNOWN) & (self._releases[slots] == releases)
        first = np.where(known, self._sent[slots], 0)
        new = np.maximum(used - first, 0)
        total = int(new.sum())
        if total:
            rows = np.repeat(slots.astype(np.int64), new)
            columns = np.arange(total) + np.repeat(first - (np.cumsum(new) - new), new)
            places, values = (rows + 1) * self._columns + columns, tables[rows, columns]
            there = self._staging.upload({"places": places, "values": values})
            self._there.view(-1).index_put_((there["places"],), there["values"])
        self._releases[slots], self._sent[slots] = releases, first + new
        return total

    def rows(self, table_rows: torch.Tensor, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tables of some rows.

        Args:
            table_rows: i8 `[R]` on the device: slots + 1, 0 for padding.
            width: columns wanted.
            out: i4 `[R, width]` to be written; None: a new one.

        Returns:
            i4 `[R, width]`; columns past a row's end are 0 or stale.
        """
        part = self._there[:, :width]
        if out is None:
            return torch.index_select(part, 0, table_rows)
        return torch.index_select(part, 0, table_rows, out=out)

    def _hold(self, slots: int, columns: int) -> None:
        """Room for so many, of which nothing is known yet."""
        self._columns = columns
        self._sent = np.zeros(slots, np.int64)
        self._releases = np.full(slots, _UNKNOWN, np.int64)
        self._there = torch.zeros((slots + 1, columns), dtype=torch.int32, device=self._device)
