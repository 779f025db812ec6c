//! `pgrejoin-server`: parses, serves until told to stop, exits.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use server::cli::Cli;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

#[expect(clippy::print_stderr, reason = "main reports the error that ends the program")]
fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    if rustix::process::geteuid().is_root() {
        eprintln!(
            "pgrejoin-server: error: cannot be run as root: run it as the user that owns the data \
             directory"
        );
        return ExitCode::from(2);
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pgrejoin-server: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let config = cli.into_config()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("could not watch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("could not watch SIGINT")?;
        let mut hangup = signal(SignalKind::hangup()).context("could not watch SIGHUP")?;
        let (reload, reloads) = mpsc::channel(1);
        let signals = stop.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => signals.cancel(),
                    _ = interrupt.recv() => signals.cancel(),
                    // A reload that is already waiting serves this signal too.
                    _ = hangup.recv() => drop(reload.try_send(())),
                }
            }
        });
        Ok(server::serve(config, stop, reloads, |_| {}).await?)
    });
    // Reads that hang on a dead disk must not hold the exit up.
    runtime.shutdown_background();
    served
}
