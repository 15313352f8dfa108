"""The README's Python examples give the numbers that it shows."""

import doctest
from pathlib import Path


def test_readme_examples_give_what_they_show():
    readme = Path(__file__).parents[1] / "README.md"
    result = doctest.testfile(str(readme), module_relative=False)
    assert result.attempted > 10 and result.failed == 0
