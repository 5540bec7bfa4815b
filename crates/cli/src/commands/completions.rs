//! `hypernbd completions SHELL`.

use clap::CommandFactory;
use clap_complete::Shell;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    pub shell: Shell,
}

/// Prints the completions of the command line `C`.
pub fn run<C: CommandFactory>(args: &Args) {
    clap_complete::generate(args.shell, &mut C::command(), "hypernbd", &mut std::io::stdout());
}
