//! `pgrejoin`: parses, runs until done or told to stop, exits with a documented code.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser as _;
use client::cli::{Cli, Command, OutputArg};
use client::commands::{recover, rewind, status};
use client::config::Output;
use client::monitor::json::Json;
use client::monitor::lines::Lines;
use client::monitor::terminal::Terminal;
use client::monitor::{Monitor, print_err, print_lines, print_out};
use client::panics;
use client::task::{Signals, Stop};
use client::{Class, Config, RewindError, TargetState};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .init();
    let json = matches!(&cli.command, Command::Rewind(args) if args.output == OutputArg::Json);
    let (stop, terminated) = (Stop::default(), Arc::new(AtomicBool::new(false)));
    let target = cli.command.target().to_owned();
    let run = Run { stop: stop.clone(), terminated: Arc::clone(&terminated) };
    match panics::guarded(&stop, &target, || run.command(cli.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = error.class().exit_code(terminated.load(Ordering::Relaxed));
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

/// Ends an interrupted rewind: resume or rollback.
type Ending = fn(&Path, &dyn Monitor, &Signals) -> Result<client::Outcome, RewindError>;

/// One run of the program.
struct Run {
    stop: Stop,
    /// Whether SIGTERM has come.
    terminated: Arc<AtomicBool>,
}

impl Run {
    fn command(self, command: Command) -> Result<u8, RewindError> {
        if rustix::process::geteuid().is_root() {
            let message = "cannot be run as root: run it as the user that owns the data directory";
            return Err(RewindError::new(Class::Usage, message));
        }
        match command {
            Command::Rewind(args) => {
                let config = Config::new(*args)?;
                let json = config.output == Output::Json;
                let monitor = monitor(&config);
                let outcome = self.until_stopped(|stop| rewind::rewind(config, monitor, stop))?;
                match json {
                    true => print_out(&outcome.json().to_string()),
                    false => print_lines(&outcome.text()),
                }
            }
            Command::Resume(args) => self.end(args.target_pgdata, recover::resume)?,
            Command::Rollback(args) => self.end(args.target_pgdata, recover::rollback)?,
            Command::Status(args) => {
                let status = status::status(&args.target_pgdata)?;
                print_lines(&status.text);
                return Ok(status.state.code());
            }
        }
        Ok(0)
    }

    fn end(self, target: PathBuf, ending: Ending) -> Result<(), RewindError> {
        let outcome = self.until_stopped(|stop| async move {
            let work = move || ending(&target, &Lines::new(true), &stop.signals);
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
                let message = "internal error: a worker thread failed";
                Err(RewindError::because(Class::Other, message, error))
            })
        })?;
        print_lines(&outcome.text());
        Ok(())
    }

    /// Runs `work` to its end; SIGTERM and SIGINT tell it to stop.
    fn until_stopped<F>(self, work: impl FnOnce(Stop) -> F) -> Result<client::Outcome, RewindError>
    where
        F: Future<Output = Result<client::Outcome, RewindError>>,
    {
        let failed = |error: std::io::Error| {
            RewindError::because(Class::Other, "could not set up the runtime", error)
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(failed)?;
        let Self { stop, terminated } = self;
        let result = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
            // A lost terminal must not end a run that changes the target.
            let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
            let told = stop.clone();
            tokio::spawn(async move {
                loop {
                    tokio::select! {
                        _ = terminate.recv() => terminated.store(true, Ordering::Relaxed),
                        _ = interrupt.recv() => {}
                        _ = hangup.recv() => continue,
                    }
                    told.signals.receive();
                    told.cancelled.cancel();
                }
            });
            work(stop).await
        });
        // Threads that still wait for the network must not hold the exit up.
        runtime.shutdown_background();
        result
    }
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
