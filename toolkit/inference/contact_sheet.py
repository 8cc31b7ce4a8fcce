"""A contact sheet: small pictures with the model's answers, as one HTML file or a PNG image."""

import base64
import html
import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..shared.console import needs, one_line
from ..shared.files import written_whole
from .outputs import Prediction


SHEET_ENDINGS = (".html", ".htm", ".png")
THUMBNAIL = 192
TILE_TEXT = 54
MAX_COLUMNS = 8

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; }}
main {{ display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax({width}px, 1fr)); }}
figure {{ margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: 8px; overflow-wrap: anywhere; }}
img, .none {{ display: block; width: 100%; height: {width}px; object-fit: contain; background: #f4f4f4; }}
.none {{ display: grid; place-items: center; text-align: center; color: #a00; }}
.file {{ color: #666; font-size: 12px; }}
.answer {{ display: grid; grid-template-columns: 1fr auto; gap: 0 .6em; }}
meter {{ grid-column: 1 / 3; width: 100%; height: 8px; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<main>
{figures}
</main>
</body>
</html>
"""


def make_thumbnail(image: Image.Image) -> bytes:
    """The image as a JPEG. Its long side has at most `THUMBNAIL` pixels; small images keep their size."""
    scale = min(1, THUMBNAIL / max(image.size))
    size = [max(1, round(side * scale)) for side in image.size]
    file = io.BytesIO()
    image.resize(size, reducing_gap=3).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_contact_sheet(path: Path, predictions: list[Prediction], title: str, summary: str) -> None:
    """Writes the sheet, as HTML or PNG by its ending. The HTML is one file that loads nothing from elsewhere."""
    with written_whole(path) as part:
        if path.suffix.lower() == ".png":
            draw_sheet(predictions, f"{title}: {summary}").save(part, "PNG")
            return
        page = PAGE.format(
            title=html.escape(one_line(title)),
            summary=html.escape(one_line(summary)),
            width=THUMBNAIL,
            figures="\n".join(map(figure, predictions)),
        )
        part.write_text(page, encoding="utf-8", errors="backslashreplace")


def figure(prediction: Prediction) -> str:
    """The HTML of one file. Names, labels and reasons are shown as text, whatever they contain."""
    name = html.escape(one_line(prediction.file))
    if prediction.reason:
        picture = f'<div class="none">{html.escape(one_line(prediction.reason))}</div>'
    else:
        source = base64.b64encode(prediction.thumbnail).decode()
        picture = f'<img alt="{name}" src="data:image/jpeg;base64,{source}">'
    answers = "".join(
        f'<div class="answer"><span>{html.escape(one_line(answer["label"]))}</span><span>{answer["score"]:.1%}</span>'
        f'<meter value="{answer["score"]:.4f}"></meter></div>'
        for answer in prediction.answers
    )
    return f'<figure>{picture}<figcaption>{answers}<div class="file">{name}</div></figcaption></figure>'


def draw_sheet(predictions: list[Prediction], title: str) -> Image.Image:
    with needs("predict"):
        from matplotlib import font_manager  # for its font
    columns = min(MAX_COLUMNS, max(4, math.ceil(math.sqrt(len(predictions)))))
    rows = max(1, math.ceil(len(predictions) / columns))
    width, height, margin = THUMBNAIL + 16, THUMBNAIL + TILE_TEXT, 36
    sheet = Image.new("RGB", (columns * width, rows * height + margin), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    pen.text((8, 10), shorten(title, font, sheet.width - 16), "black", font)
    for index, prediction in enumerate(predictions):
        row, column = divmod(index, columns)
        draw_tile(sheet, pen, font, prediction, column * width + 8, row * height + margin)
    return sheet


def draw_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, prediction: Prediction, x: int, y: int
) -> None:
    """Draws one file: its picture, the best answer with a bar, and its name; for a bad file, the reason."""
    pen.rectangle((x, y, x + THUMBNAIL - 1, y + THUMBNAIL - 1), fill="#f4f4f4")
    if prediction.reason:
        text, colour = prediction.reason, "#a00000"
    else:
        picture = Image.open(io.BytesIO(prediction.thumbnail))
        scale = max(1, THUMBNAIL // max(picture.size))
        picture = picture.resize([side * scale for side in picture.size], Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (THUMBNAIL - picture.width) // 2, y + (THUMBNAIL - picture.height) // 2))
        best = prediction.answers[0]
        text, colour = f"{best['score']:.1%} {best['label']}", "black"
        length = round(THUMBNAIL * min(max(best["score"], 0), 1))
        pen.rectangle((x, y + THUMBNAIL, x + length, y + THUMBNAIL + 3), fill="#2a78c8")
    pen.text((x, y + THUMBNAIL + 6), shorten(text, font, THUMBNAIL), colour, font)
    name = shorten(prediction.file, font, THUMBNAIL, keep_end=True)
    pen.text((x, y + THUMBNAIL + 25), name, "#666666", font)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int, keep_end: bool = False) -> str:
    """The text, cut at its end, or at its beginning with `keep_end`, to at most `width` pixels."""
    text = one_line(text)
    if font.getlength(text) <= width:
        return text
    # Bisection finds how many characters fit.
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        part = text[-middle:] if keep_end else text[:middle]
        low, high = (middle, high) if font.getlength(part + "…") <= width else (low, middle - 1)
    return "…" + text[len(text) - low :] if keep_end else text[:low] + "…"
