//! What the command line may say over file and environment.

use std::path::PathBuf;

use super::ConfigError;
use super::layers::known_key;

/// Flags, as the CLI fills them in. Everything absent leaves the lower layers alone.
#[derive(Debug, Clone, Default)]
pub struct ConfigOverrides {
    /// `--config FILE`.
    pub config: Option<PathBuf>,
    /// `--system`: the machine's folders.
    pub system: bool,
    /// `--user`: a person's folders, even for root.
    pub user: bool,
    /// `--state DIR`.
    pub state: Option<PathBuf>,
    /// `--models DIR`.
    pub models: Option<PathBuf>,
    /// `--runtime DIR`.
    pub runtime: Option<PathBuf>,
    /// `--network NAME`.
    pub network: Option<String>,
    /// `--listen ADDRESS`, any number.
    pub listen: Vec<String>,
    /// `--external ADDRESS`, any number.
    pub external: Vec<String>,
    /// `--bootstrap ADDRESS`, any number.
    pub bootstrap: Vec<String>,
    /// `--mdns true|false`.
    pub mdns: Option<bool>,
    /// `--admin HOST:PORT`.
    pub admin: Option<String>,
    /// `--worker PROGRAM`.
    pub worker: Option<PathBuf>,
    /// `--set section.key=value`, any number, last one wins.
    pub set: Vec<String>,
}

/// A flag, the key it sets, and the text it sets it to.
pub(super) type FlagValue = (String, &'static str, String);

impl ConfigOverrides {
    pub(super) fn pairs(&self) -> Result<Vec<FlagValue>, ConfigError> {
        let mut pairs: Vec<FlagValue> = Vec::new();
        let mut one = |flag: &str, key: &'static str, text: Option<String>| {
            pairs.extend(text.map(|text| (flag.to_owned(), key, text)));
        };
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
        let list = |items: &[String]| {
            let items = items.iter().cloned().map(toml::Value::String).collect();
            Some(toml::Value::Array(items).to_string()).filter(|text| text != "[]")
        };
        one("--state", "storage.state", path(&self.state));
        one("--models", "storage.models", path(&self.models));
        one("--runtime", "storage.runtime", path(&self.runtime));
        one("--network", "network.id", self.network.clone());
        one("--listen", "network.listen", list(&self.listen));
        one("--external", "network.external", list(&self.external));
        one("--bootstrap", "network.bootstrap", list(&self.bootstrap));
        one("--mdns", "network.mdns", self.mdns.map(|on| on.to_string()));
        one("--admin", "admin.listen", self.admin.clone());
        one("--worker", "engine.worker", path(&self.worker));
        for given in &self.set {
            let (key, text) =
                given.split_once('=').ok_or_else(|| ConfigError::Set { given: given.clone() })?;
            pairs.push((
                format!("--set {given}"),
                known_key(key.trim(), "flag --set")?,
                text.trim().to_owned(),
            ));
        }
        Ok(pairs)
    }
}
