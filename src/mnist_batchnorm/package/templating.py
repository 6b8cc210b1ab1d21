"""The texts of a package: templates filled in."""

import functools

import jinja2


def fill(template: str, **values: object) -> str:
    """Fill in a template of this package; a name that it lacks is an error."""
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_batchnorm.package"),
        autoescape=False,  # noqa: S701 - no HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
