from quire.engine.build import FEWEST_STEP_TOKENS, LONGEST_STEP_SECONDS, _step_tokens


def test_a_slow_machine_takes_smaller_steps_and_says_so(capsys):
    assert _step_tokens(1024, LONGEST_STEP_SECONDS / 2000) == 1024
    assert capsys.readouterr().err == ""
    assert _step_tokens(1024, LONGEST_STEP_SECONDS / 500) == 500
    assert "from 1024 to 500" in capsys.readouterr().err
    assert _step_tokens(1024, LONGEST_STEP_SECONDS) == FEWEST_STEP_TOKENS
    assert _step_tokens(16, LONGEST_STEP_SECONDS) == 16
