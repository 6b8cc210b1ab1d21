"""``mnist-bn``: finds the command's module by name, imports only that one, maps errors to exits.

Nothing here changes what a stage computes, so no stage in ``dvc.yaml`` depends on this file.
"""

import gc
import importlib
import sys

import click

from mnist_batchnorm.core.exit import status_of

# Name -> summary. The summaries are here so that --help imports no command. A command's module has
# its name, with _ for -.
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
    "runs": "List MLflow's runs beside their commits and experiments.",
    "which": "Tell what made a model file, by its hash.",
    "serve": "Serve the proven models over the Open Inference Protocol.",
    "predict": "Classify pictures of digits.",
    "package": "Write what Triton, KServe or MLflow serve.",
    "regress": "Compare the exported model's outputs with the golden ones.",
    "promote": "Make a registered version the champion.",
    "rollback": "Put the champion before the present one back.",
    "sign": "Sign the model files.",
    "verify-signature": "Check that the model files are those that a key's owner signed.",
}


class LazyGroup(click.Group):
    """A click group that imports a command's module when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the stages in pipeline order, then the other commands."""
        return [*STAGES, *COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return its ``command`` object."""
        if cmd_name not in STAGES | COMMANDS:
            return None
        package = "stages" if cmd_name in STAGES else "commands"
        module = importlib.import_module(f"mnist_batchnorm.{package}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl(list((STAGES | COMMANDS).items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mnist-batchnorm")
def cli() -> None:
    """Train, export and verify the batch-norm MLP.

    Each command is one stage of dvc.yaml or a tool beside it. Exit status: 0 done, 1 the check
    that the command exists for failed, 2 the caller's mistake.
    """


def main() -> None:
    """Run the command line; the console script ``mnist-bn``."""
    # Looking for cycles again and again, among ever more modules, is a fifth of the time of a large
    # import. What a command leaves behind is little; trainings alone may run for long.
    if sys.argv[1:2] not in (["train"], ["seeds"]):
        gc.disable()  # to the end: Python's own last collection takes half a second
    sys.exit(status_of(lambda: cli(prog_name="mnist-bn", standalone_mode=False)))
