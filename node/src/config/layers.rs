//! File, then environment, then flags, one over the other; what nobody knows is refused with the nearest known name.

use std::path::Path;

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::docs::{DOCS, SECTIONS};
use super::file::FileConfig;
use super::paths::Environment;
use super::{ConfigError, ConfigOverrides};

/// Every variable of ours begins like this: `KINOFLOCKD_NETWORK_LISTEN` is `network.listen`.
const ENV_PREFIX: &str = "KINOFLOCKD_";

/// Variables that other parts of the daemon read.
const RESERVED_ENV: &[&str] = &["KINOFLOCKD_CONFIG", "KINOFLOCKD_LOG", "KINOFLOCKD_LOG_FORMAT"];

/// Reads the text of a file.
///
/// # Errors
/// When it is no TOML, names an unknown key, or gives a value of the wrong type: each with its line.
pub(super) fn parse_file(path: &Path, text: &str) -> Result<FileConfig, ConfigError> {
    let syntax = |error: &toml::de::Error| ConfigError::Syntax {
        place: place(path, text, error.span().map_or(0, |span| span.start)),
        message: one_line(error.message()),
    };
    let document = DeTable::parse(text).map_err(|error| syntax(&error))?;
    refuse_unknown(path, text, document.get_ref(), "")?;
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        match key_at(document.get_ref(), at, "") {
            Some(key) => {
                ConfigError::Value { key, place: place(path, text, at), message: one_line(error.message()) }
            }
            None => syntax(&error),
        }
    })
}

/// Lays the environment and then the flags over `file`.
///
/// # Errors
/// When a variable or flag names no key, or its value is not of the key's type.
pub(super) fn overlay(
    file: FileConfig,
    env: &Environment,
    overrides: &ConfigOverrides,
) -> Result<FileConfig, ConfigError> {
    let mut table = Table::try_from(&file).expect("invariant: the file form serialises");
    let mut merged = file;
    for (name, text) in env.vars.iter().filter(|(name, _)| name.starts_with(ENV_PREFIX)) {
        if RESERVED_ENV.contains(&name.as_str()) {
            continue;
        }
        let key = key_of_variable(name)?;
        merged = set(&mut table, key, text, &format!("environment variable {name}"))?;
    }
    for (flag, key, text) in overrides.pairs()? {
        merged = set(&mut table, key, &text, &format!("flag {flag}"))?;
    }
    Ok(merged)
}

/// The key that `given` names.
///
/// # Errors
/// When there is none; the error names the nearest.
pub(super) fn known_key(given: &str, place: &str) -> Result<&'static str, ConfigError> {
    if given == "device" || given.starts_with("device.") {
        return Err(only_in_file(given, place));
    }
    DOCS.iter().map(|doc| doc.key).find(|key| *key == given).ok_or_else(|| ConfigError::UnknownKey {
        key: given.to_owned(),
        place: place.to_owned(),
        nearest: nearest_key(given),
    })
}

/// Devices are a list of sections; a flag or a variable could not say which one it means.
fn only_in_file(key: &str, place: &str) -> ConfigError {
    ConfigError::Value {
        key: key.to_owned(),
        place: place.to_owned(),
        message: "devices can only be set in the configuration file, one [[device]] section each".to_owned(),
    }
}

fn key_of_variable(name: &str) -> Result<&'static str, ConfigError> {
    if name.strip_prefix(ENV_PREFIX).is_some_and(|rest| rest == "DEVICE" || rest.starts_with("DEVICE_")) {
        return Err(only_in_file(name, "environment"));
    }
    let settable = || DOCS.iter().map(|doc| doc.key).filter(|key| !key.starts_with("device."));
    settable().find(|key| variable_of(key) == name).ok_or_else(|| {
        let nearest =
            settable().map(variable_of).min_by_key(|known| strsim::damerau_levenshtein(known, name));
        ConfigError::UnknownKey {
            key: name.to_owned(),
            place: "environment".to_owned(),
            nearest: nearest.unwrap_or_default(),
        }
    })
}

/// The environment variable of a key.
#[must_use]
pub(super) fn variable_of(key: &str) -> String {
    format!("{ENV_PREFIX}{}", key.replace('.', "_").to_ascii_uppercase())
}

fn set(table: &mut Table, key: &'static str, text: &str, place: &str) -> Result<FileConfig, ConfigError> {
    let (section, leaf) = key.split_once('.').expect("invariant: every documented key has a section");
    let slot = table
        .get_mut(section)
        .and_then(Value::as_table_mut)
        .and_then(|section| section.get_mut(leaf))
        .expect("invariant: every documented key is in the serialised form");
    *slot = typed(text, slot);
    FileConfig::deserialize(table.clone()).map_err(|error| ConfigError::Value {
        key: key.to_owned(),
        place: place.to_owned(),
        message: one_line(error.message()),
    })
}

/// Text from a variable or flag, in the TOML type that the key has now.
fn typed(text: &str, like: &Value) -> Value {
    match like {
        Value::Boolean(_) => text.parse().map_or_else(|_| Value::String(text.to_owned()), Value::Boolean),
        Value::Integer(_) => text.parse().map_or_else(|_| Value::String(text.to_owned()), Value::Integer),
        Value::Array(_) if text.trim_start().starts_with('[') => {
            let parsed = toml::from_str::<Table>(&format!("list = {text}"));
            parsed.ok().and_then(|mut table| table.remove("list")).unwrap_or(Value::String(text.to_owned()))
        }
        Value::Array(_) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Value::Array(items.map(|item| Value::String(item.to_owned())).collect())
        }
        _ => Value::String(text.to_owned()),
    }
}

fn refuse_unknown(path: &Path, text: &str, table: &DeTable<'_>, prefix: &str) -> Result<(), ConfigError> {
    for (name, value) in table.iter() {
        let key = if prefix.is_empty() {
            name.get_ref().to_string()
        } else {
            format!("{prefix}.{}", name.get_ref())
        };
        let section = SECTIONS.iter().any(|doc| doc.key == key);
        if !section && !DOCS.iter().any(|doc| doc.key == key) {
            let nearest = nearest_key(&key);
            return Err(ConfigError::UnknownKey {
                key,
                place: place(path, text, name.span().start),
                nearest,
            });
        }
        match value.get_ref() {
            DeValue::Table(inner) if section => refuse_unknown(path, text, inner, &key)?,
            DeValue::Array(items) if section => {
                for inner in items.iter().filter_map(|item| item.get_ref().as_table()) {
                    refuse_unknown(path, text, inner, &key)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The known name that is most like `given`: a key of the same section if one is close, the same word in another
/// section, or whatever is least far away.
fn nearest_key(given: &str) -> String {
    const CLOSE: usize = 3;
    let distance = |known: &str| strsim::damerau_levenshtein(known, given);
    let keys = || DOCS.iter().chain(SECTIONS).map(|doc| doc.key);
    if let Some((section, leaf)) = given.rsplit_once('.') {
        let beside = keys().filter(|key| key.strip_prefix(section).is_some_and(|rest| rest.starts_with('.')));
        if let Some(key) = beside.min_by_key(|key| distance(key)).filter(|key| distance(key) <= CLOSE) {
            return key.to_owned();
        }
        if let Some(key) = keys().find(|key| key.rsplit_once('.').is_some_and(|(_, known)| known == leaf)) {
            return key.to_owned();
        }
    } else if let Some(key) = keys().find(|key| key.rsplit_once('.').is_some_and(|(_, known)| known == given))
    {
        return key.to_owned();
    }
    keys().min_by_key(|key| distance(key)).unwrap_or_default().to_owned()
}

/// The key whose value spans the byte `at`.
fn key_at(table: &DeTable<'_>, at: usize, prefix: &str) -> Option<String> {
    table.iter().find_map(|(name, value)| {
        let key = if prefix.is_empty() {
            name.get_ref().to_string()
        } else {
            format!("{prefix}.{}", name.get_ref())
        };
        let inner = match value.get_ref() {
            DeValue::Table(inner) => key_at(inner, at, &key),
            DeValue::Array(items) => items
                .iter()
                .filter_map(|item| item.get_ref().as_table())
                .find_map(|inner| key_at(inner, at, &key)),
            _ => None,
        };
        inner.or_else(|| (value.span().contains(&at) || name.span().contains(&at)).then_some(key))
    })
}

fn place(path: &Path, text: &str, at: usize) -> String {
    let line = text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1;
    format!("{}, line {line}", path.display())
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(": ")
}
