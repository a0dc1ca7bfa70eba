import pytest
import tiny


@pytest.fixture(scope="module")
def lm():
    return tiny.llama_lm()


@pytest.fixture(scope="module")
def rm():
    return tiny.llama_rm()
