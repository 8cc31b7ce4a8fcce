"""
Transformers' own test modules as a package: those that `fetch_transformers_tests.py` fetches, and stand-ins for what
its source distribution leaves out.
"""

from fetch_transformers_tests import SUITES

from . import stand_ins


if not SUITES.exists():
    raise ImportError(f"{SUITES} is missing: run `python tests/conformance/fetch_transformers_tests.py` first.")

__path__.append(str(SUITES))
stand_ins.install(__name__, SUITES)
