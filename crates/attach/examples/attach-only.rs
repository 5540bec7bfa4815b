//! `hypernbd` with the commands about attaching alone, which is built in seconds: tests/kernel copies it into its machine.
#![allow(dead_code, missing_docs)]

#[path = "../../cli/src/commands/attach.rs"]
mod attach;
#[path = "../../cli/src/output.rs"]
mod output;

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
enum Command {
    Attach(attach::Args),
    Detach(attach::DetachArgs),
    Attached(attach::ListArgs),
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let done = match Command::parse() {
        Command::Attach(args) => attach::run(&args),
        Command::Detach(args) => attach::detach(&args),
        Command::Attached(args) => attach::list(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hypernbd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
