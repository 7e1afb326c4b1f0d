from __future__ import annotations

from serve_app.core import PixelImage
from serve_app.engine.drawing.pixels import share_out
from serve_app.errors import InternalError
from serve_app.refusals import NonFinite
from tests.engine_cases import photo, request, use_of

BLACK = PixelImage(8, 8, bytes(8 * 8 * 3))
NEARLY = PixelImage(8, 8, bytes(8 * 8 * 3 - 1) + b"\x01")
WITH_ADAPTER = request(adapters=(use_of("acme/loud", 3.0),))


def test_a_black_image_of_an_adapter_is_an_error_that_names_it() -> None:
    (share,) = share_out([WITH_ADAPTER], [BLACK], [True], [False])
    assert isinstance(share, NonFinite)
    assert "acme/loud at scale 3" in str(share)
    assert "all black" in str(share)


def test_an_image_with_one_pixel_that_is_not_black_is_an_image() -> None:
    assert share_out([WITH_ADAPTER], [NEARLY], [True], [False]) == ((NEARLY,),)


def test_black_is_an_image_where_a_picture_was_given_where_it_was_censored_and_without_adapters() -> None:
    edit = request(adapters=(use_of("acme/loud"),), image=photo(8, 8), strength=0.5)
    for wanted, is_censored in ((edit, False), (WITH_ADAPTER, True), (request(), False)):
        assert share_out([wanted], [BLACK], [True], [is_censored]) == ((BLACK,),)


def test_one_request_of_a_pass_fails_and_the_others_keep_their_images() -> None:
    pair = request(num_images=2, adapters=(use_of("acme/loud"),))
    first, second, third = share_out(
        [WITH_ADAPTER, pair, request()], [NEARLY, NEARLY, BLACK, NEARLY], [True, True, True, False], [False] * 4
    )
    assert first == (NEARLY,)
    assert isinstance(second, NonFinite)
    assert isinstance(third, InternalError)
