"""The entry of RFD4-Proteina."""

from __future__ import annotations

import torch
from class_entry import ClassEntry, Random
from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS, SEQUENCE_PROBABILITY_TOKENS
from sequence_arguments import padding_mask, timestep


def _proteina_atoms(random: Random, tokens: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Conditions on the 37 atoms of each token. Atoms without a given place have NaN coordinates, in ångström."""
    atoms = (*tokens, 37)
    coordinates = random.normal(*atoms, 3) * 5
    coordinates[random.integers(0, 2, *atoms).bool()] = torch.nan
    values = {
        "coordinates": coordinates,
        "internal_coordinates": random.normal(*atoms, 3) * 5,
        "coordinate_group": random.integers(-1, 3, *atoms),
        "rasa": random.normal(*atoms).abs(),
        "hbond": random.integers(0, 4, *atoms),
        "pistack": random.integers(0, 2, *atoms),
        "pication": random.integers(0, 4, *atoms),
        "saltbridge": random.integers(0, 2, *atoms),
        "hydrophobic": random.integers(0, 2, *atoms),
        "metal_coord": random.integers(0, 2, *atoms),
        "hotspot": random.integers(0, 2, *atoms),
    }
    prepared = values["coordinate_group"].float()  # the pipeline's name for groups in a random order
    return {
        **{CONDITION_KEYS[name]: value for name, value in values.items()},
        "charge": random.integers(-1, 2, *atoms),
        "element": random.integers(1, 9, *atoms),
        "_prepared_coord_group_seq": prepared,
    }


def _proteina_tokens(random: Random, tokens: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Conditions on tokens, among them the chirality of one centre: token 1, whose neighbours are 0, 2 and 3."""
    values = {
        "sequence": random.integers(0, 20, *tokens),
        "secondary_structure": random.integers(0, 4, *tokens),
        "index_group": random.integers(0, 2, *tokens),
        "cath": random.integers(-1, 4, *tokens, 3),
        "centroid": random.normal(*tokens, 3) * 5,
    }
    chiral_frames = torch.full((*tokens, 6, 5), -1)
    chiral_frames[:, 1, 0] = torch.tensor([1, 1, 0, 2, 3])
    chiral_owners = torch.full((*tokens, 6), -1)
    chiral_owners[:, 1, 0] = 6  # slot 0 of token 1, counted over the six slots of each token
    return {
        **{CONDITION_KEYS[name]: value for name, value in values.items()},
        **{
            f"condition_sequence-probability-{name}_1_residue": random.normal(*tokens).abs()
            for name in SEQUENCE_PROBABILITY_TOKENS[::4]
        },
        "molecule_iid": random.integers(0, 2, *tokens),
        "molecule_entity_id": random.integers(0, 2, *tokens),
        "na_ss_state": random.integers(0, 2, *tokens),
        "na_ss_state_mask": random.integers(0, 2, *tokens).bool(),
        "chirality": torch.nn.functional.normalize(random.normal(*tokens, 6, 3), dim=-1).flatten(2),
        "chiral_frame_atoms": chiral_frames,
        "chiral_slot_owner": chiral_owners,
        "is_in_context_conditioning": random.integers(0, 4, *tokens) == 0,
        "supports_local_latent": random.integers(0, 4, *tokens) > 0,
    }


def _proteina_pairs(random: Random, tokens: tuple[int, int]) -> dict[str, torch.Tensor]:
    pairs = (*tokens, tokens[1])
    return {
        "token_bond_path_length": random.integers(0, 9, *pairs),
        "bond_mask": random.integers(0, 2, *pairs).bool(),
        "bond_order": random.integers(0, 5, *pairs),
        "is_aromatic": random.integers(0, 2, *pairs).bool(),
        "canonical_polymer_ordering": random.normal(*pairs),
        "na_ss_pair": random.integers(0, 2, *pairs),
        "na_ss_pair_mask": random.integers(0, 2, *pairs).bool(),
    }


def _proteina(random: Random) -> dict[str, object]:
    """Two molecules of six and five tokens, in two passes through the layers."""
    tokens = (2, 6)
    return {
        "bb_ca": random.normal(*tokens, 3),
        "local_latents": random.normal(*tokens, 8),
        "bb_ca_time": timestep(0.4, 2),
        "local_latents_time": timestep(0.3, 2),
        "padding_mask": padding_mask((6, 5), 6),
        "token_type": random.integers(0, 7, *tokens),
        "atom37_mask": random.integers(0, 2, *tokens, 37).bool(),
        "conditioning": {
            **_proteina_atoms(random, tokens),
            **_proteina_tokens(random, tokens),
            **_proteina_pairs(random, tokens),
        },
        "recycle_depth": 2,
        "attention_kwargs": None,
    }


ENTRIES = (
    ClassEntry(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 4,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 24,
            "pair_repr_dim": 16,
            "latent_dim": 8,
            "token_type_emb_dim": 8,
            "cath_emb_dim": 4,
            "t_emb_dim": 16,
            "seq_sep_dim": 8,
            "tri_mult_c": 16,
            "num_sequence_classes": 30,
            "recycle_conditioning_dim": 2,
        },
        _proteina,
    ),
)
