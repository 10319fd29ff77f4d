//! Folders: XDG for a person, `/etc`, `/var/lib` and `/run` for a system service.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What the process was started with, as a value, so that a test can say it.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// The environment variables.
    pub vars: BTreeMap<String, String>,
    /// Whether the process runs as root.
    pub root: bool,
}

/// Whose daemon this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A person's, in their home.
    User,
    /// The machine's, under `/etc` and `/var/lib`.
    System,
}

/// The default places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    /// Whose.
    pub scope: Scope,
    /// The configuration file.
    pub config: PathBuf,
    /// Key, queue, clips, receipts.
    pub state: PathBuf,
    /// Model folders.
    pub models: PathBuf,
    /// The addresses file of the running daemon.
    pub runtime: PathBuf,
}

/// The name of the configuration file in its folder.
const CONFIG_FILE: &str = "node.toml";

impl Environment {
    /// The environment of this process.
    #[must_use]
    pub fn of_process() -> Self {
        // Variables that are not UTF-8 cannot be ours.
        let vars = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        #[cfg(unix)]
        let root = rustix::process::geteuid().is_root();
        #[cfg(not(unix))]
        let root = false;
        Self { vars, root }
    }

    fn folder(&self, name: &str) -> Option<PathBuf> {
        // systemd joins several folders with ':'; the first is ours. XDG says that relative paths are to be ignored.
        let first = self.vars.get(name)?.split(':').next()?;
        let path = Path::new(first);
        path.is_absolute().then(|| path.to_owned())
    }
}

impl Scope {
    /// A system service when asked, when systemd gave a state folder, or for root; else a person's.
    #[must_use]
    pub fn choose(env: &Environment, system: bool, user: bool) -> Self {
        let service = system || (!user && (env.root || env.folder("STATE_DIRECTORY").is_some()));
        if service { Self::System } else { Self::User }
    }
}

impl Folders {
    /// The default folders of `scope`; `None` for a user without a home.
    #[must_use]
    pub fn of(scope: Scope, env: &Environment) -> Option<Self> {
        match scope {
            Scope::System => Some(Self::system(env)),
            Scope::User => Self::user(env),
        }
    }

    fn system(env: &Environment) -> Self {
        let state = env.folder("STATE_DIRECTORY").unwrap_or_else(|| PathBuf::from("/var/lib/kinoflock"));
        let config = env.folder("CONFIGURATION_DIRECTORY").unwrap_or_else(|| PathBuf::from("/etc/kinoflock"));
        let runtime = env.folder("RUNTIME_DIRECTORY").unwrap_or_else(|| PathBuf::from("/run/kinoflock"));
        Self {
            scope: Scope::System,
            config: config.join(CONFIG_FILE),
            models: state.join("models"),
            state,
            runtime,
        }
    }

    fn user(env: &Environment) -> Option<Self> {
        let home = env.folder("HOME");
        let under =
            |var: &str, below: &str| env.folder(var).or_else(|| home.as_ref().map(|home| home.join(below)));
        let config = under("XDG_CONFIG_HOME", ".config")?.join("kinoflock");
        let data = under("XDG_DATA_HOME", ".local/share")?.join("kinoflock");
        let state = data.join("node");
        let runtime = match env.folder("XDG_RUNTIME_DIR") {
            Some(runtime) => runtime.join("kinoflock"),
            None => state.join("run"),
        };
        Some(Self {
            scope: Scope::User,
            config: config.join(CONFIG_FILE),
            models: data.join("models"),
            state,
            runtime,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn env(vars: &[(&str, &str)], root: bool) -> Environment {
        let vars = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Environment { vars, root }
    }

    #[test]
    fn a_person_gets_xdg_folders() {
        let env = env(
            &[("HOME", "/home/a"), ("XDG_DATA_HOME", "/data"), ("XDG_RUNTIME_DIR", "/run/user/7")],
            false,
        );
        let folders = Folders::of(Scope::choose(&env, false, false), &env).unwrap();
        assert_eq!(folders.config, Path::new("/home/a/.config/kinoflock/node.toml"));
        assert_eq!(folders.state, Path::new("/data/kinoflock/node"));
        assert_eq!(folders.models, Path::new("/data/kinoflock/models"));
        assert_eq!(folders.runtime, Path::new("/run/user/7/kinoflock"));
    }

    #[test]
    fn a_service_gets_etc_var_lib_and_run_or_what_systemd_says() {
        let plain = env(&[("HOME", "/root")], true);
        let folders = Folders::of(Scope::choose(&plain, false, false), &plain).unwrap();
        assert_eq!(folders.config, Path::new("/etc/kinoflock/node.toml"));
        assert_eq!(folders.state, Path::new("/var/lib/kinoflock"));
        assert_eq!(folders.runtime, Path::new("/run/kinoflock"));

        let given = env(&[("STATE_DIRECTORY", "/var/lib/private/k:/other")], false);
        assert_eq!(Scope::choose(&given, false, false), Scope::System);
        let folders = Folders::of(Scope::System, &given).unwrap();
        assert_eq!(folders.state, Path::new("/var/lib/private/k"));
    }

    #[test]
    fn root_may_ask_for_a_persons_folders_and_a_person_for_the_systems() {
        let root = env(&[("HOME", "/root")], true);
        assert_eq!(Scope::choose(&root, false, true), Scope::User);
        let person = env(&[("HOME", "/home/a")], false);
        assert_eq!(Scope::choose(&person, true, false), Scope::System);
        assert_eq!(Folders::of(Scope::User, &env(&[], false)), None);
    }
}
