"""The command line ``mnist-bn``: imports only the module of the command that is called.

Nothing here changes what a stage computes, so no stage in ``dvc.yaml`` depends on this file.
"""

import gc
import importlib
import sys

import click

from mnist_batchnorm.core.exit import status_of
from mnist_batchnorm.core.extras import missing_extra, require_extra

# Name -> summary, here so that --help imports no command. A command's module has its name, with _
# for -.
STAGES = {  # in pipeline order
    "download": "Fetch the four MNIST files and verify their hashes.",
    "prepare": "Split the images into train, valid and test.",
    "train": "Train the networks, both at once.",
    "seeds": "Train both networks from many seeds.",
    "evaluate": "Measure the networks on the test images.",
    "export": "Export the batch-norm network to ONNX in eval mode.",
    "verify": "Prove that ONNX Runtime computes what PyTorch computes.",
    "register": "Register the ONNX files, and make them champion if every rule allows it.",
    "report": "Draw the plots and write the HTML report and the model card.",
    "sync": "Update MLflow to match the files.",
}
COMMANDS = {
    **STAGES,
    "runs": "List MLflow's runs beside their commits and experiments.",
    "which": "Show which run and commit produced a model file.",
    "serve": "Serve the proven models over the Open Inference Protocol.",
    "predict": "Classify pictures of digits.",
    "package": "Write the models as Triton, KServe or MLflow serve them.",
    "regress": "Compare the exported model's outputs with the golden ones.",
    "promote": "Make a registered version the champion.",
    "rollback": "Restore the previous champion; repeat to go back further.",
    "sign": "Sign the model files.",
    "verify-signature": "Check the signature of the model files.",
}
EXTRA = {  # that a command needs, where it is not `pipeline`
    "predict": "client",
    "serve": "serve",
    "sign": "signing",
    "verify-signature": "signing",
}


class LazyGroup(click.Group):
    """A click group that imports a command's module when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the table."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return its ``command`` object."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name == "train":  # its child processes import what this process does not
            require_extra("pipeline")
        package = "stages" if cmd_name in STAGES else "commands"
        module = importlib.import_module(f"mnist_batchnorm.{package}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mnist-batchnorm")
def cli() -> None:
    """Train, export and verify the batch-norm MLP.

    Each command is one stage of dvc.yaml or a tool beside it. Exit status: 0 done, 1 the check
    that the command performs failed, 2 the caller's mistake.
    """


def run() -> None:
    """Run the command line.

    Raises:
        UserError: The command imports a package that an extra would install.
    """
    try:
        cli(prog_name="mnist-bn", standalone_mode=False)
    except ModuleNotFoundError as error:
        command = "".join(sys.argv[1:2])
        raise missing_extra(error, EXTRA.get(command, "pipeline")) or error from None


def main() -> None:
    """Run the command line and exit; the console script ``mnist-bn``."""
    # Searching for cycles again and again, among ever more modules, is a fifth of the time of a
    # large import. A command leaves little behind; only training may run for long.
    if sys.argv[1:2] not in (["train"], ["seeds"]):
        gc.disable()  # to the end: Python's own last collection takes half a second
    sys.exit(status_of(run))
