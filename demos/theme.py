"""How the pages look: one theme for light and dark, and Gradio's page with our style sheet and scripts in its head."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css")
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> Any:
    """Gradio's theme, on fonts that every machine has: nothing is fetched. Text has a contrast of 4.5 and more."""
    import gradio as gr

    colours = gr.themes.colors
    return gr.themes.Base(
        primary_hue=colours.blue, secondary_hue=colours.blue, neutral_hue=colours.slate, font=_SANS, font_mono=_MONO
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="*neutral_200",
        button_secondary_background_fill_hover="*neutral_300",
        button_secondary_background_fill_dark="*neutral_700",
        button_secondary_background_fill_hover_dark="*neutral_600",
        button_secondary_text_color="*neutral_900",
        button_secondary_text_color_dark="*neutral_50",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def dress(page: str, title: str, scripts: Sequence[str]) -> str:
    """Gradio's page with the title, our style sheet, and a script element for each name below /static/."""
    head = [f"<title>{html.escape(title)}</title>", '<meta name="color-scheme" content="light dark">']
    head.append('<link rel="stylesheet" href="/static/page.css">')
    head += [f'<script src="/static/{html.escape(name)}" defer></script>' for name in scripts]
    return page.replace("</head>", "\n".join([*head, "</head>"]), 1)
