from hypothesis import given
from hypothesis import strategies as st

from quire.core import errors
from quire.core.errors import ErrorInfo, QuireError, from_info


def all_classes(root: type[QuireError]) -> list[type[QuireError]]:
    return [root, *(found for child in root.__subclasses__() for found in all_classes(child))]


def test_every_class_has_a_code_of_its_own():
    classes = all_classes(QuireError)
    assert len({cls.code for cls in classes}) == len(classes) > 20


@given(
    cls=st.sampled_from([cls for cls in all_classes(QuireError) if cls.__module__ == errors.__name__]),
    message=st.text(),
    param=st.none() | st.text(),
    remedy=st.none() | st.text(),
    retry_after=st.none() | st.floats(0, 1e6),
)
def test_an_error_survives_the_trip_as_data(cls, message, param, remedy, retry_after):
    """Between a front end and its engine, which know these; those that other rooms add stay in their process."""
    error = cls(message, param=param, remedy=remedy, retry_after=retry_after)
    back = from_info(error.to_info())
    assert type(back) is cls
    assert back.to_info() == error.to_info()
    assert back.status == error.status


def test_a_code_from_a_newer_version_is_still_an_error():
    back = from_info(ErrorInfo(code="from_the_future", message="Hm."))
    assert type(back) is QuireError
    assert str(back) == "Hm."


def test_the_remedy_is_part_of_what_is_printed():
    assert str(errors.QueueFull("Full.", remedy="Come back.")) == "Full. Come back."
