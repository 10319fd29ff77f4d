//! Commands that file permissions bind. Root may read every file; a command that is started by these may not, even
//! when the tests are run by root.

use std::process::Command;

/// Rights of root over other people's files.
const RIGHTS: &str = "--bounding-set=-dac_override,-dac_read_search";

/// The same command without root's rights over files.
#[must_use]
pub fn by_permissions(command: &Command) -> Command {
    if !rustix::process::geteuid().is_root() {
        let mut same = Command::new(command.get_program());
        same.args(command.get_args());
        return with_surroundings(same, command);
    }
    let mut bound = Command::new("setpriv");
    bound.arg(RIGHTS).arg(command.get_program()).args(command.get_args());
    with_surroundings(bound, command)
}

fn with_surroundings(mut to: Command, from: &Command) -> Command {
    for (name, value) in from.get_envs() {
        match value {
            Some(value) => to.env(name, value),
            None => to.env_remove(name),
        };
    }
    if let Some(folder) = from.get_current_dir() {
        to.current_dir(folder);
    }
    to
}
