"""The public API: what it lists, and that verbs stay functions although modules share their names."""

from __future__ import annotations

import deploykit


def test_public_names_are_these():
    assert deploykit.__all__ == [
        "__version__",
        "DataOptions",
        "DeploykitError",
        "Fused",
        "Head",
        "InputError",
        "Loaded",
        "Phase",
        "ProofError",
        "Recipe",
        "bench",
        "check",
        "deploy",
        "export",
        "fuse",
        "load",
        "swap_head",
        "train_head",
    ]
    assert all(getattr(deploykit, name) is not None for name in deploykit.__all__)


def test_verbs_are_functions_after_their_modules_were_imported():
    import deploykit.fuse.reasons  # binds the module on the package, as far as the package lets it
    from deploykit.check import Candidate
    from deploykit.fuse import CODES

    assert callable(deploykit.fuse)
    assert callable(deploykit.check)
    assert CODES
    assert Candidate


def test_every_exported_name_has_a_docstring():
    assert [name for name in deploykit.__all__[1:] if not getattr(deploykit, name).__doc__] == []
