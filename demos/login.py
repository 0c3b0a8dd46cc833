"""The page that asks for a name and a password."""

from __future__ import annotations

import html

PATH = "/login"


def page(problem: str = "") -> str:
    """The page, with what went wrong at the last attempt."""
    said = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Log in</title>
<link rel="stylesheet" href="/static/page.css">
</head>
<body class="login">
<main>
<h1>Log in</h1>
{said}
<form method="post" action="{PATH}">
<label for="name">Name</label>
<input id="name" name="name" autocomplete="username" maxlength="64" required autofocus>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" maxlength="256" required>
<button type="submit">Log in</button>
</form>
</main>
</body>
</html>
"""
