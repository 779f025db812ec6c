//! `pgrejoin`: parses, runs until done or told to stop, exits with a documented code.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clap::Parser as _;
use client::cli::{Cli, Command, OutputArg};
use client::commands::{recover, rewind, status};
use client::config::Output;
use client::monitor::json::Json;
use client::monitor::lines::Lines;
use client::monitor::terminal::Terminal;
use client::monitor::{Monitor, print_err, print_out};
use client::task::{Signals, Stop};
use client::{Class, Config, RewindError, TargetState};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .init();
    let json = matches!(&cli.command, Command::Rewind(args) if args.output == OutputArg::Json);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => {
            if json {
                let line = serde_json::json!({
                    "event": "error",
                    "message": error.chain(),
                    "exit_code": code,
                    "target_unchanged": error.target() == TargetState::Unchanged,
                });
                print_out(&line.to_string());
            }
            print_err(&format!("pgrejoin: error: {}", error.chain()));
            ExitCode::from(code)
        }
    }
}

fn run(command: Command) -> Result<(), (RewindError, u8)> {
    let plain = |error: RewindError| {
        let code = error.class().exit_code(false);
        (error, code)
    };
    if rustix::process::geteuid().is_root() {
        let message = "cannot be run as root: run it as the user that owns the data directory";
        return Err(plain(RewindError::new(Class::Usage, message)));
    }
    let stop = Stop::default();
    match command {
        Command::Rewind(args) => {
            let config = Config::new(*args).map_err(plain)?;
            let json = config.output == Output::Json;
            let monitor = monitor(&config);
            let outcome = until_stopped(stop.clone(), rewind::rewind(config, monitor, stop))?;
            if json {
                print_out(&outcome.json().to_string());
            } else {
                print_out(outcome.text().trim_end());
            }
        }
        Command::Resume(args) => end(stop, args.target_pgdata, recover::resume)?,
        Command::Rollback(args) => end(stop, args.target_pgdata, recover::rollback)?,
        Command::Status(args) => {
            print_out(&status::status(&args.target_pgdata).map_err(plain)?);
        }
    }
    Ok(())
}

/// Ends an interrupted rewind: resume or rollback.
type Ending = fn(&Path, &dyn Monitor, &Signals) -> Result<client::Outcome, RewindError>;

fn end(stop: Stop, target: PathBuf, ending: Ending) -> Result<(), (RewindError, u8)> {
    let outcome = until_stopped(stop.clone(), async move {
        let signals = Arc::clone(&stop.signals);
        let work = move || ending(&target, &Lines::new(true), &signals);
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            let message = "internal error: a worker thread failed";
            Err(RewindError::because(Class::Other, message, error)
                .leaving(TargetState::PartlyChanged))
        })
    })?;
    print_out(outcome.text().trim_end());
    Ok(())
}

fn monitor(config: &Config) -> Arc<dyn Monitor> {
    match config.output {
        Output::Json => Arc::new(Json::default()),
        Output::Text if config.progress && std::io::stderr().is_terminal() => {
            Arc::new(Terminal::new())
        }
        Output::Text => Arc::new(Lines::new(config.progress)),
    }
}

/// Runs `work` to its end; SIGTERM and SIGINT tell it to stop.
fn until_stopped(
    stop: Stop,
    work: impl Future<Output = Result<client::Outcome, RewindError>>,
) -> Result<client::Outcome, (RewindError, u8)> {
    let failed = |error: std::io::Error| {
        (RewindError::because(Class::Other, "could not set up the runtime", error), 1)
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(failed)?;
    let terminated = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        // A lost terminal must not end a run that changes the target.
        let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
        let by_term = Arc::clone(&terminated);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => by_term.store(true, Ordering::Relaxed),
                    _ = interrupt.recv() => {}
                    _ = hangup.recv() => continue,
                }
                stop.signals.receive();
                stop.cancelled.cancel();
            }
        });
        work.await.map_err(|error| {
            let code = error.class().exit_code(terminated.load(Ordering::Relaxed));
            (error, code)
        })
    });
    // Threads that still wait for the network must not hold the exit up.
    runtime.shutdown_background();
    result
}
