"""``PYTHONPATH=tests python -m evidence.reference``: writes the pages that are read from the sources."""

from evidence.reference import PAGES, ROOT

for name, page in PAGES.items():
    (ROOT / name).write_text(page(), encoding="utf-8")
    print(name)
