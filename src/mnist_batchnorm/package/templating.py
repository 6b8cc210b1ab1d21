"""Templates of a package's text files."""

from mnist_batchnorm.core.templates import template_environment


def fill(template: str, **values: object) -> str:
    """Render a template of this package; an undefined variable is an error."""
    return template_environment("mnist_batchnorm.package").get_template(template).render(values)
