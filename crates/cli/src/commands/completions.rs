//! `hypernbd completions SHELL`.

use std::io::Write;

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    pub shell: Shell,
}

/// Prints the completions of the command line `C`.
pub fn run<C: CommandFactory>(args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut C::command(), "hypernbd", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}
