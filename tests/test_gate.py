"""What a run makes of tests that are skipped."""

from pathlib import Path

import pytest

from tests import gate
from tests.gate import Allowed


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Where pytest runs with the plugin; one reason holds on this machine, one does not."""
    table = {
        "no left hand": Allowed("left hands", lambda: True),
        "no right hand": Allowed("right hands", lambda: False),
    }
    monkeypatch.setattr(gate, "ALLOWED", table)
    pytester.makeconftest("pytest_plugins = ['tests.gate']")
    return pytester


def outcome(run: pytest.Pytester, *options: str) -> pytest.RunResult:
    """In this process, without what is slow in a large one."""
    plain = ("--assert=plain", "-p", "no:asyncio", "-p", "no:unraisableexception")
    return run.runpytest_inprocess(*plain, *options)


def test_an_allowed_skip_passes_and_the_run_says_what_it_left_unchecked(run: pytest.Pytester) -> None:
    run.makepyfile(
        """
        import pytest

        @pytest.mark.skipif(True, reason="no left hand")
        @pytest.mark.parametrize("finger", range(3))
        def test_finger(finger): ...

        def test_palm():
            pytest.skip("no left hand")
        """
    )
    result = outcome(run)
    assert result.ret == 0
    result.assert_outcomes(skipped=4)
    result.stdout.fnmatch_lines(["not checked on this machine: left hands (no left hand): 4 tests"])


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        ("tired", "*skipped for a reason that tests.gate.ALLOWED does not list: tired*"),
        ("no right hand", "*skipped for a reason that does not hold on this machine: no right hand*"),
    ],
)
def test_any_other_skip_fails_the_run_however_it_is_said(
    run: pytest.Pytester, reason: str, fault: str
) -> None:
    run.makepyfile(
        f"""
        import pytest

        @pytest.fixture
        def hand():
            pytest.skip({reason!r})

        @pytest.mark.skipif(True, reason={reason!r})
        def test_condition(): ...

        @pytest.mark.skip({reason!r})
        def test_mark(): ...

        def test_call():
            pytest.skip({reason!r})

        def test_fixture(hand): ...
        """
    )
    result = outcome(run)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1, errors=3)
    result.stdout.fnmatch_lines([fault] * 4)


def test_a_module_that_is_skipped_for_a_missing_library_fails_the_run(run: pytest.Pytester) -> None:
    run.makepyfile("import pytest\npytest.importorskip('no_such_library')\ndef test_it(): ...")
    result = outcome(run)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*skipped for a reason that * does not list: could not import*"])


def test_a_skip_in_another_process_fails_the_run_too(
    run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gate.__file__).parents[1]))  # where children find the plugin
    run.makepyfile("import pytest\ndef test_it(): pytest.skip('tired')\ndef test_other(): ...")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    result = run.runpytest_subprocess("-p", "xdist", "-n", "1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=1)


def test_a_failure_that_is_expected_is_no_skip(run: pytest.Pytester) -> None:
    run.makepyfile("import pytest\n@pytest.mark.xfail(reason='known')\ndef test_it(): assert False")
    assert outcome(run).ret == 0


def test_tests_of_gpu_kernels_without_a_gpu_are_said_to_have_run_in_the_interpreter(
    run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "ON_A_GPU", Allowed("kernels on a GPU", lambda: False))
    run.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): ...")
    result = outcome(run, "-W", "ignore")
    result.stdout.fnmatch_lines(["not checked on this machine: kernels on a GPU: 1 tests"])
