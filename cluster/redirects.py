"""HTTP that follows no redirect: a token, a login or a signed message is for the host that it is sent to.

An answer that asks for one is an error of `urllib`, with its status. A login page in front of a server is so, too.
"""

from __future__ import annotations

import urllib.request
from typing import Any

__all__ = ["opener_without_redirects"]


def opener_without_redirects(*handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """What opens URLs, with these handlers besides the usual ones."""
    return urllib.request.build_opener(_NoRedirects(), *handlers)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None
