"""A text for demos and examples, from Python's own documentation."""

from __future__ import annotations

import hashlib
import os
import tempfile

from megafn.runtime.text.cache import cache_folder


def demo_text() -> str:
    """The path of about 460 kB of English prose.

    These are the 79 documents of Python's `pydoc_data.topics`, under the PSF licence. They are
    written into the user's cache folder once, atomically, since every rank calls this.
    """
    from pydoc_data.topics import topics

    content = "\f".join(topics[name] for name in sorted(topics)).encode("utf-8")
    path = cache_folder() / f"python-topics-{hashlib.sha256(content).hexdigest()[:12]}.txt"
    if not path.exists() or path.stat().st_size != len(content):
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(content)
        os.replace(file.name, path)
    return str(path)
