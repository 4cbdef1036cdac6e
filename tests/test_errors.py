"""What an error says: each fault, and what holds of several places once."""

from __future__ import annotations

import pickle

from xtuner2llava.errors import Fault, PlanError, listed


def test_what_holds_of_several_places_is_said_once() -> None:
    faults = [Fault("a:1", "is wrong", "Do this."), Fault("b:2", "is missing")]
    faults += [Fault(f"c:{line}", "is wrong", "Do this.") for line in range(12)]
    places = "; ".join(f"c:{line}" for line in range(10))
    assert listed(faults) == [
        f"a:1: is wrong\n    The same at 12 more places: {places}; ...\n    Do this.",
        "b:2: is missing",
    ]
    assert listed(faults[:3]) == [
        "a:1: is wrong\n    The same at 1 more place: c:0\n    Do this.",
        "b:2: is missing",
    ]
    error = PlanError.from_faults(faults)
    assert str(error).startswith("14 faults:\n- a:1: is wrong\n    The same at 12 more places")
    assert error.faults == tuple(faults)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301


def test_a_name_with_line_feeds_makes_no_line() -> None:
    """Else a hostile checkpoint says that it is verified, or what to type."""
    name = "a\nVerified: all\n    Run: this"
    faults = [Fault(name, f"{name} is wrong", f"It lies beside {name}.")] * 2
    faults.append(Fault(f"{name} 2", faults[0].what, faults[0].advice))
    for text in (str(faults[0]), *listed(faults), str(PlanError.from_faults(faults))):
        for line in text.splitlines():
            assert not line.strip().startswith(("Verified", "Run"))
        assert r"a\nVerified: all\n    Run: this: a\nVerified" in text


def test_what_differs_is_not_said_as_one() -> None:
    faults = [Fault("a", "is wrong"), Fault("a", "is wrong", "Do this."), Fault("b", "is Wrong")]
    assert listed(faults) == [str(fault) for fault in faults]
