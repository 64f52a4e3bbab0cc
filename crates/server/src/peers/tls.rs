//! Mutual TLS among members.
//!
//! Promises. T1: both sides of a connection show a certificate that the one CA file vouches for; the dialler also demands that the
//! certificate names the host it dialled (a DNS name or an IP address). T2: new files are used by the connections that are opened after
//! the change, without a restart; files that cannot be used are told once and the old ones stay.
//! Not promised. Which member a certificate belongs to: whoever has one of this CA may claim any identity of the cluster, so the CA must
//! be the cluster's own. The acceptor checks no name. An open connection lives on when its certificate expires.
//! A certificate must allow both uses, server and client, or name none.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Where the PEM files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
}

/// The certificates in use. They follow their files.
pub(crate) struct PeerTls {
    files: TlsFiles,
    current: Mutex<Loaded>,
}

struct Loaded {
    stamps: [Option<SystemTime>; 3],
    configs: Configs,
}

#[derive(Clone)]
pub(super) struct Configs {
    pub(super) accept: Arc<ServerConfig>,
    pub(super) dial: Arc<ClientConfig>,
}

impl PeerTls {
    /// The error is a sentence for the operator.
    pub(crate) fn load(files: TlsFiles) -> Result<Self, String> {
        let stamps = stamps(&files);
        let configs = read(&files)?;
        Ok(Self { files, current: Mutex::new(Loaded { stamps, configs }) })
    }

    /// What a new connection uses.
    pub(super) fn configs(&self) -> Configs {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&self.files);
        if stamps != current.stamps {
            // Also when they cannot be used: they are tried again when they change again.
            current.stamps = stamps;
            match read(&self.files) {
                Ok(configs) => {
                    current.configs = configs;
                    tracing::info!("the certificate files for members have changed and are in use");
                }
                Err(why) => tracing::error!(why, "the changed certificate files for members cannot be used"),
            }
        }
        current.configs.clone()
    }
}

fn stamps(files: &TlsFiles) -> [Option<SystemTime>; 3] {
    [&files.cert, &files.key, &files.ca].map(|file| fs::metadata(file).and_then(|found| found.modified()).ok())
}

fn read(files: &TlsFiles) -> Result<Configs, String> {
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| format!("{} holds no private key in PEM: {error}", files.key.display()))?;
    let mut roots = RootCertStore::empty();
    for root in certificates(&files.ca)? {
        roots.add(root).map_err(|error| format!("{} holds no CA: {error}", files.ca.display()))?;
    }
    let roots = Arc::new(roots);
    let provider = Arc::new(default_provider());
    let unusable = |error: &dyn std::fmt::Display| format!("{} cannot be used: {error}", files.cert.display());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|error| unusable(&error))?;
    let mut accept = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(|error| unusable(&error))?;
    // A resumed session would not look at the certificate again.
    accept.send_tls13_tickets = 0;
    let mut dial = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&error))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|error| unusable(&error))?;
    dial.resumption = Resumption::disabled();
    Ok(Configs { accept: Arc::new(accept), dial: Arc::new(dial) })
}

fn certificates(file: &PathBuf) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("{} holds no certificate in PEM: {why}", file.display());
    let found = CertificateDer::pem_file_iter(file).map_err(|error| wrong(&error))?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(|error| wrong(&error))?;
    if found.is_empty() { Err(wrong(&"it is empty")) } else { Ok(found) }
}
