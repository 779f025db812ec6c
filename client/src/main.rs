//! `pgrejoin`: parses, runs until done or told to stop, exits with a documented code.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clap::Parser as _;
use client::cli::{Cli, Command, OutputArg};
use client::monitor::Monitor;
use client::monitor::json::Json;
use client::monitor::lines::Lines;
use client::monitor::terminal::Terminal;
use client::rewind::{self, Stop};
use client::unfinished;
use client::{Class, Config, RewindError};
use tokio::signal::unix::{SignalKind, signal};

/// Exit code after SIGTERM, as shells count it.
const TERMINATED: u8 = 143;

#[expect(clippy::print_stderr, reason = "main reports the error that ends the program")]
#[expect(clippy::print_stdout, reason = "main reports the error as an object where asked to")]
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
                    "target_unchanged": !matches!(error.class(), Class::Unfinished | Class::Rewound),
                });
                println!("{line}");
            }
            eprintln!("pgrejoin: error: {}", error.chain());
            ExitCode::from(code)
        }
    }
}

#[expect(clippy::print_stdout, reason = "main reports the result")]
fn run(command: Command) -> Result<(), (RewindError, u8)> {
    let plain = |error: RewindError| {
        let code = error.class().exit_code();
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
            let json = config.output == OutputArg::Json;
            let outcome = rewind_until_stopped(config, stop)?;
            if json {
                println!("{}", outcome.json());
            } else {
                print!("{}", outcome.text());
            }
        }
        Command::Resume(args) => {
            let lines = Lines::new(true);
            let outcome =
                unfinished::resume(&args.target_pgdata, &lines, &stop.flag).map_err(plain)?;
            print!("{}", outcome.text());
        }
        Command::Status(args) => {
            println!("{}", unfinished::status(&args.target_pgdata).map_err(plain)?);
        }
    }
    Ok(())
}

fn monitor(config: &Config) -> Arc<dyn Monitor> {
    match config.output {
        OutputArg::Json => Arc::new(Json::default()),
        OutputArg::Text if config.progress && std::io::stderr().is_terminal() => {
            Arc::new(Terminal::new())
        }
        OutputArg::Text => Arc::new(Lines::new(config.progress)),
    }
}

fn rewind_until_stopped(config: Config, stop: Stop) -> Result<client::Outcome, (RewindError, u8)> {
    let failed =
        |error: std::io::Error| (RewindError::because(Class::Other, "could not start", error), 1);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(failed)?;
    let terminated = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        // A lost terminal must not end a run that changes the target.
        let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
        let (told, by_term) = (stop.clone(), Arc::clone(&terminated));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => by_term.store(true, Ordering::Relaxed),
                    _ = interrupt.recv() => {}
                    _ = hangup.recv() => continue,
                }
                told.flag.store(true, Ordering::Relaxed);
                told.cancelled.cancel();
            }
        });
        let monitor = monitor(&config);
        rewind::rewind(config, monitor, stop).await.map_err(|error| {
            let code = match error.class() {
                Class::Interrupted if terminated.load(Ordering::Relaxed) => TERMINATED,
                class => class.exit_code(),
            };
            (error, code)
        })
    });
    // Threads that still wait for the network must not hold the exit up.
    runtime.shutdown_background();
    result
}
