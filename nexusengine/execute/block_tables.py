"""Block tables that stay on the device: a step brings the entries that changed, and picks its rows there."""

from __future__ import annotations

import numpy as np
import torch

from nexusengine.arrays import I4
from nexusengine.execute.staging import Staging


class DeviceTables:
    """The block tables of all slots on a device.

    Row 0 is that of rows of padding, all null blocks; slot s has row s + 1. The device works in order, so that a step
    in flight has read its tables before those of the next change.

    Args:
        device: where they are.
        columns: blocks of the longest sequence.
    """

    def __init__(self, device: torch.device, columns: int) -> None:
        self._device = device
        self._staging = Staging(device)
        self._host = np.zeros((1, columns), np.int32)
        self._there = torch.zeros((1, columns), dtype=torch.int32, device=device)

    def update(self, tables: I4, slots: I4, width: int) -> int:
        """Bring what changed in the first `width` columns of some slots' tables.

        Args:
            tables: i4 `[S, B]`, of all slots.
            slots: i4 `[R]`.
            width: columns that the step reads.

        Returns:
            The number of entries that were written.
        """
        if len(self._host) <= len(tables) or self._host.shape[1] < tables.shape[1]:
            shape = (len(tables) + 1, max(self._host.shape[1], tables.shape[1]))
            self._host = np.zeros(shape, np.int32)
            self._there = torch.zeros(shape, dtype=torch.int32, device=self._device)
        wanted = tables[slots, :width]
        rows, columns = np.nonzero(wanted != self._host[slots + 1, :width])
        if not len(rows):
            return 0
        values, places = wanted[rows, columns], slots[rows].astype(np.int64) + 1
        self._host[places, columns] = values
        there = self._staging.upload({"places": places * self._host.shape[1] + columns, "values": values})
        self._there.view(-1).index_put_((there["places"],), there["values"])
        return len(rows)

    def rows(self, table_rows: torch.Tensor, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tables of some rows.

        Args:
            table_rows: i8 `[R]` on the device: slots + 1, 0 for padding.
            width: columns wanted.
            out: i4 `[R, width]` to be written; None: a new one.

        Returns:
            i4 `[R, width]`.
        """
        part = self._there[:, :width]
        if out is None:
            return torch.index_select(part, 0, table_rows)
        return torch.index_select(part, 0, table_rows, out=out)
