"""The union of a window's sketches with the estimate so far, of many equal matrices at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraga_dist.engines.base import naming
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.sketch_state import State, Window
from loraga_dist.linalg import boolean_sum, complete_bases


def unite(states: Sequence[State], home: StateHome, generators: Sequence[torch.Generator]) -> None:
    """Make one estimate and its bases of the windows' sketches and the estimates so far; on the owner.

    states: of one shape and pass, each with a window. generators: for each, where its gradient has no more directions.
    """
    with naming(states[0].matrix, len(states) - 1):
        windows = [state.window for state in states if state.window is not None]
        P_BMK, Q_BNK = (torch.stack(bases) for bases in zip(*(state.bases(home) for state in states), strict=True))
        Y_BMK = _stacked([window.Y_MK for window in windows], home)
        Z_BNK = _stacked([window.Z_NK for window in windows], home)
        is_finite_B = (Y_BMK.sum(dim=(1, 2)) + Z_BNK.sum(dim=(1, 2))).isfinite()
        for state, is_finite in zip(states, is_finite_B.tolist(), strict=True):
            if not is_finite:
                with naming(state.matrix):
                    raise ValueError("its sketch holds a NaN or an infinity")
        E_BMS = _stacked([state.E_2MS for state in states], home).sum(dim=1)
        if not states[0].refining:
            captures = _captures(states, home, P_BMK, Q_BNK, Y_BMK, Z_BNK, E_BMS)
            for state, capture in zip(states, captures, strict=True):
                state.captures.append(capture)
        # the carried estimate joins after the reduce, or it would count once per rank
        S_BK = torch.stack([state.S_K for state in states if state.S_K is not None])
        Y_BMK.addcmul_(P_BMK, S_BK[:, None])
        Z_BNK.addcmul_(Q_BNK, S_BK[:, None])
        U_BMK, S_BK, V_BNK = boolean_sum(Y_BMK, Z_BNK, P_BMK, Q_BNK, S_BK.shape[1])
        del P_BMK, Q_BNK, Y_BMK, Z_BNK
        P_BMK, Q_BNK = complete_bases([U_BMK, V_BNK], S_BK > 0, generators)
        for state, window, S_K, P_MK, Q_NK, E_MS in zip(states, windows, S_BK, P_BMK, Q_BNK, E_BMS, strict=True):
            _take_over(state, window, home, S_K, P_MK, Q_NK, E_MS)


def shares_held(held_BMS: Tensor, E_BMS: Tensor) -> list[float]:
    """1 - ||(G - H) Phi||^2 / ||G Phi||^2 from H Phi and G Phi, an estimate of the energy share of G that H holds."""
    rest_B, whole_B = (
        torch.linalg.vector_norm(each, dim=(1, 2), dtype=torch.float64).square() for each in (E_BMS - held_BMS, E_BMS)
    )
    return torch.where(whole_B > 0, 1 - rest_B / whole_B, 0).tolist()


def _captures(
    states: Sequence[State],
    home: StateHome,
    P_BMK: Tensor,
    Q_BNK: Tensor,
    Y_BMK: Tensor,
    Z_BNK: Tensor,
    E_BMS: Tensor,
) -> list[float]:
    """The share of each window's energy that its own sketch holds."""
    earlier_BMS = _stacked([state.earlier_E_MS for state in states if state.earlier_E_MS is not None], home)
    Phi = [home.fetch(state.window.QPhi_NC)[:, P_BMK.shape[2] :] for state in states if state.window is not None]
    Phi_BNS = torch.stack(Phi).float()
    # P P^T G + (I - P P^T) G Q Q^T on Phi
    outside = Y_BMK @ (Q_BNK.mT @ Phi_BNS)
    held_BMS = outside + P_BMK @ (Z_BNK.mT @ Phi_BNS - P_BMK.mT @ outside)
    return shares_held(held_BMS, E_BMS - earlier_BMS)


def _take_over(
    state: State, window: Window, home: StateHome, S_K: Tensor, P_MK: Tensor, Q_NK: Tensor, E_MS: Tensor
) -> None:
    assert state.S_K is not None and state.earlier_E_MS is not None
    QPhi_NC = home.fetch(window.QPhi_NC)
    QPhi_NC[:, : len(S_K)] = Q_NK
    home.put_back(window.QPhi_NC, QPhi_NC)
    home.put_back(window.P_MK, P_MK)
    home.put_back(state.earlier_E_MS, E_MS)
    state.S_K.copy_(S_K)
    state.keep_rest(home, P_MK, Q_NK)


def _stacked(kept: Sequence[Tensor], home: StateHome) -> Tensor:
    return torch.stack([home.fetch(tensor) for tensor in kept])
