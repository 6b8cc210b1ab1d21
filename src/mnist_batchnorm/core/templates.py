"""Jinja templates in the ``templates`` folder of a package."""

import functools

import jinja2


@functools.cache
def template_environment(package: str) -> jinja2.Environment:
    """Return a package's templates; only HTML is escaped, an undefined variable is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
