//! `completions` and `man`: shell completions and manual pages, generated from the texts of
//! `--help`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use roff::{Roff, roman};

use super::output;
use super::{Arguments, Exit};

/// Print completions for a shell
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler completions bash > /usr/share/bash-completion/completions/stripe-reconciler
  stripe-reconciler completions zsh > \"${fpath[1]}/_stripe-reconciler\"
  stripe-reconciler completions fish > ~/.config/fish/completions/stripe-reconciler.fish")]
pub struct Completions {
    shell: Shell,
}

/// Write one manual page per command into a folder
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler man /usr/local/share/man/man1
  stripe-reconciler man . && man -l ./stripe-reconciler-copy.1")]
pub struct Man {
    /// Folder for the pages, created if missing
    folder: PathBuf,
}

impl Completions {
    pub(super) fn run(self) -> anyhow::Result<Exit> {
        let mut script = Vec::new();
        let mut command = Arguments::command();
        let name = command.get_name().to_owned();
        clap_complete::generate(self.shell, &mut command, name.clone(), &mut script);
        if self.shell == Shell::Bash {
            // clap_complete writes a name with a hyphen in two ways, so subcommands have no
            // completions (clap-rs/clap#6421).
            let (wrong, right) = (name.replace('-', "__subcmd__"), name.replace('-', "__"));
            script = String::from_utf8(script)?
                .replace(&wrong, &right)
                .into_bytes();
        }

        output::bytes(&script)?;

        Ok(Exit::Done)
    }
}

impl Man {
    pub(super) fn run(self) -> anyhow::Result<Exit> {
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("{} cannot be created", self.folder.display()))?;
        let mut command = Arguments::command().disable_help_subcommand(true);
        command.build();
        let pages = write_pages(&command, &self.folder)?;
        output::line(format!(
            "{pages} pages written to {}",
            self.folder.display()
        ))?;
        Ok(Exit::Done)
    }
}

/// Writes the pages of a command and of its subcommands. Returns their number.
fn write_pages(command: &clap::Command, folder: &Path) -> anyhow::Result<usize> {
    let man = clap_mangen::Man::new(command.clone());
    let mut page = Vec::new();

    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = command.get_after_help() {
        verbatim(&text.to_string()).to_writer(&mut page)?;
    }

    let path = folder.join(man.get_filename());
    std::fs::write(&path, page).with_context(|| format!("{} cannot be written", path.display()))?;

    let mut pages = 1;
    for below in command.get_subcommands() {
        pages += write_pages(below, folder)?;
    }
    Ok(pages)
}

/// Renders the examples and the text after them with their line breaks and blanks.
fn verbatim(text: &str) -> Roff {
    let mut section = Roff::new();
    let (title, rest) = text.split_once(":\n").unwrap_or(("Examples", text));
    section
        .control("SH", [title.to_uppercase().as_str()])
        .control("nf", []);
    for line in rest.lines() {
        section.text([roman(line)]);
    }
    section.control("fi", []);
    section
}
