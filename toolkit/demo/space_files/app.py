"""The page of this Space. The folder `hpool_vit` beside this file holds all of its code."""

from pathlib import Path

from hpool_vit.toolkit.demo.app import serve


here = Path(__file__).resolve().parent
photos = here / "photos"
serve(models_dir=here / "models", examples_dir=photos if photos.is_dir() else None)
