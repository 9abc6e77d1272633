"""QR factorizations of tall matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def thin_qr(X_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(Q_MK, R_KK) with Q R = X and orthonormal columns of Q, in the dtype of X.

    On CPUs by one thread: from 96 columns on LAPACK hands panels from thread to thread, 25 times slower at two threads.
    """
    num_threads = torch.get_num_threads()
    if X_MK.device.type != "cpu" or num_threads == 1:
        Q_MK, R_KK = torch.linalg.qr(X_MK)
        return Q_MK, R_KK
    torch.set_num_threads(1)
    try:
        Q_MK, R_KK = torch.linalg.qr(X_MK)
    finally:
        torch.set_num_threads(num_threads)
    return Q_MK, R_KK
