//! `pgrejoin-certs`: makes an authority and the nodes' certificates.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A small certificate authority for pgrejoin. An existing PKI serves as well.
#[derive(Debug, Parser)]
#[command(name = "pgrejoin-certs", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an authority: ca.crt and ca.key. Keep ca.key away from the nodes.
    Init {
        /// Directory to write to
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Make a node's certificate, for serving and for rewinding: NAME.crt and NAME.key
    Issue {
        /// Directory with ca.crt and ca.key
        #[arg(long, value_name = "DIR")]
        ca: PathBuf,
        /// The node's name, as others reach it and as --allow names it
        #[arg(long, value_name = "NAME")]
        name: String,
        /// A further DNS name or IP address of the node
        #[arg(long, value_name = "DNS|IP")]
        san: Vec<String>,
        /// Days the certificate is valid
        #[arg(
            long,
            value_name = "N",
            default_value_t = certs::CERTIFICATE_DAYS,
            value_parser = clap::value_parser!(u32).range(1..=certs::CERTIFICATE_DAYS_MAX),
        )]
        days: u32,
        /// Directory to write to
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Add certificates to the authority's revocation list ca.crl; without any, only prolong it
    Revoke {
        /// Directory with ca.crt and ca.key
        #[arg(long, value_name = "DIR")]
        ca: PathBuf,
        /// Days until the list must be made again
        #[arg(
            long,
            value_name = "N",
            default_value_t = 90,
            value_parser = clap::value_parser!(u32).range(1..=certs::CERTIFICATE_DAYS_MAX),
        )]
        days: u32,
        /// Certificates that count no more
        #[arg(value_name = "FILE")]
        certificates: Vec<PathBuf>,
    },
}

#[expect(clippy::print_stdout, reason = "the path of what was made")]
fn revoke(ca: &Path, certificates: &[PathBuf], days: u32) -> Result<(), certs::CertsError> {
    let list = certs::revoke(ca, certificates, days)?;
    println!("{}: copy it to each node and name it with --crl and --client-crl", list.display());
    Ok(())
}

#[expect(clippy::print_stderr, reason = "main reports the error that ends the program")]
fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Init { out } => certs::init(&out),
        Command::Issue { ca, name, san, days, out } => certs::issue(&ca, &name, &san, days, &out),
        Command::Revoke { ca, certificates, days } => revoke(&ca, &certificates, days),
    };
    match done.map_err(anyhow::Error::from) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pgrejoin-certs: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
