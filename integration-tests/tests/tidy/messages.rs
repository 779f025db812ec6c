//! The index of messages, docs/MESSAGES.md, is made of the code: `make messages` writes it, and a test compares.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use client::error::EXIT_CODES;
use syn::visit::Visit;

use super::{product, root};

/// Where a message is made, and under which heading it stands.
const CONSTRUCTORS: [(&str, &str, Made); 12] = [
    ("RewindError", "new", Made::OfClass),
    ("RewindError", "because", Made::OfClass),
    ("RewindError", "transient", Made::Under("5")),
    ("RewindError", "transient_because", Made::Under("5")),
    ("RewindError", "replan", Made::Under(REPLAN)),
    ("Abort", "replan", Made::Under(REPLAN)),
    ("NotPossible", "new", Made::Under(NOT_POSSIBLE)),
    ("NotPossible", "as_asked", Made::Under(NOT_POSSIBLE)),
    ("Undecided", "new", Made::Under(NOT_POSSIBLE)),
    ("NotPossible", "because", Made::Under(NOT_POSSIBLE)),
    ("Refusal", "new", Made::OfReason),
    ("Outcome", "new", Made::Second(RESULT)),
];

const REPLAN: &str = "Planned again";
const NOT_POSSIBLE: &str = "Why a strategy is not possible";
const REFUSED: &str = "What a server refuses";
const WARNING: &str = "Warnings";
const NOTE: &str = "Notes";
const RESULT: &str = "Results";
const CAUSE: &str = "Causes";

#[derive(Clone, Copy)]
enum Made {
    /// By the exit code of the class in its first argument.
    OfClass,
    /// By the server, for the reason in its first argument.
    OfReason,
    /// Always there.
    Under(&'static str),
    /// Always there, and it is the second argument.
    Second(&'static str),
}

/// The last two parts of a called path.
fn called(function: &syn::Expr) -> Option<(String, String)> {
    let syn::Expr::Path(path) = function else {
        return None;
    };
    let parts: Vec<String> = path.path.segments.iter().map(|part| part.ident.to_string()).collect();
    match &parts[..] {
        [.., of, name] => Some((of.clone(), name.clone())),
        _ => None,
    }
}

/// The last part of a path, as of `Class::Target`.
fn last(expression: &syn::Expr) -> Option<String> {
    let syn::Expr::Path(path) = expression else {
        return None;
    };
    path.path.segments.last().map(|part| part.ident.to_string())
}

/// The text of a literal or of a format, with its placeholders.
fn texts(expression: &syn::Expr, known: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    match expression {
        syn::Expr::Lit(literal) => match &literal.lit {
            syn::Lit::Str(text) => vec![text.value()],
            _ => Vec::new(),
        },
        syn::Expr::Macro(called) if called.mac.path.is_ident("format") => {
            let first = called.mac.tokens.clone().into_iter().next();
            let literal =
                first.and_then(|token| syn::parse_str::<syn::LitStr>(&token.to_string()).ok());
            literal.map(|literal| literal.value()).into_iter().collect()
        }
        syn::Expr::Reference(inner) => texts(&inner.expr, known),
        syn::Expr::MethodCall(call) => texts(&call.receiver, known),
        syn::Expr::Path(path) => {
            let name = path.path.get_ident().map(ToString::to_string);
            name.and_then(|name| known.get(&name).cloned()).unwrap_or_default()
        }
        syn::Expr::If(either) => {
            let otherwise = either.else_branch.iter().flat_map(|(_, other)| texts(other, known));
            in_block(&either.then_branch, known).into_iter().chain(otherwise).collect()
        }
        syn::Expr::Match(cases) => {
            cases.arms.iter().flat_map(|arm| texts(&arm.body, known)).collect()
        }
        syn::Expr::Block(block) => in_block(&block.block, known),
        _ => Vec::new(),
    }
}

fn in_block(block: &syn::Block, known: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    match block.stmts.last() {
        Some(syn::Stmt::Expr(value, None)) => texts(value, known),
        _ => Vec::new(),
    }
}

/// The messages of one file after the other.
#[derive(Default)]
struct Messages {
    /// Texts that constants of all files stand for.
    constants: BTreeMap<String, Vec<String>>,
    /// Texts that names stand for in one function.
    known: BTreeMap<String, Vec<String>>,
    /// Functions that make a message of their first argument, and its heading, by crate and name.
    helpers: BTreeMap<(String, String), String>,
    /// The same of closures of one function.
    closures: BTreeMap<String, String>,
    /// The crate that is looked at.
    own_crate: String,
    /// The type of the `impl` that is looked at.
    own_type: String,
    /// The heading of an error that is being made, if what it leaves of the target decides on it.
    left: Option<String>,
    /// By heading.
    found: BTreeMap<String, BTreeSet<String>>,
}

impl Messages {
    /// Heading and message of a call, if it makes one.
    fn made<'e>(&self, call: &'e syn::ExprCall) -> Option<(String, &'e syn::Expr)> {
        let arguments: Vec<&syn::Expr> = call.args.iter().collect();
        if let Some((mut of, name)) = called(&call.func) {
            if of == "Self" {
                of.clone_from(&self.own_type);
            }
            let (.., made) =
                CONSTRUCTORS.iter().find(|(ty, function, _)| *ty == of && *function == name)?;
            return match made {
                Made::OfClass => Some((heading(&last(arguments.first()?)?)?, arguments.get(1)?)),
                Made::OfReason => Some((REFUSED.to_owned(), arguments.get(1)?)),
                Made::Second(heading) => Some(((*heading).to_owned(), arguments.get(1)?)),
                Made::Under(heading) => {
                    let index = usize::from(name == "replan");
                    Some(((*heading).to_owned(), arguments.get(index)?))
                }
            };
        }
        let name = last(&call.func)?;
        let of_function = || self.helpers.get(&(self.own_crate.clone(), name.clone()));
        Some((self.closures.get(&name).or_else(of_function)?.clone(), arguments.first()?))
    }

    fn keep(&mut self, heading: String, texts: Vec<String>) {
        let of_heading = self.found.entry(heading).or_default();
        of_heading.extend(texts.into_iter().filter(|text| text.contains(' ')));
    }

    /// The heading of the message that `body` makes of its first parameter, if it makes one.
    fn learn(&self, parameter: Option<String>, body: &syn::Expr) -> Option<String> {
        let parameter = parameter?;
        let mut inner = Inner {
            outer: self,
            parameter: &parameter,
            known: BTreeMap::new(),
            heading: None,
            left: None,
        };
        inner.visit_expr(body);
        inner.heading
    }
}

/// Looks whether a body makes a message of a parameter.
struct Inner<'a> {
    outer: &'a Messages,
    parameter: &'a str,
    /// Texts that names stand for in the body.
    known: BTreeMap<String, Vec<String>>,
    heading: Option<String>,
    left: Option<String>,
}

impl<'ast> Visit<'ast> for Inner<'_> {
    fn visit_local(&mut self, local: &'ast syn::Local) {
        if let (Some(name), Some(init)) = (name_of(&local.pat), &local.init) {
            let texts = texts(&init.expr, &self.known);
            self.known.insert(name, texts);
        }
        syn::visit::visit_local(self, local);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        let outer = std::mem::replace(&mut self.left, left_by(call));
        syn::visit::visit_expr_method_call(self, call);
        self.left = outer;
    }

    fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
        if let Some((heading, message)) = self.outer.made(call) {
            let within = format!("{{{}}}", self.parameter);
            let is_part = |text: &String| text.contains(&within);
            let all = last(message).as_deref() == Some(self.parameter);
            if all || texts(message, &self.known).iter().any(is_part) {
                self.heading.get_or_insert(self.left.clone().unwrap_or(heading));
            }
        }
        syn::visit::visit_expr_call(self, call);
    }
}

/// The exit code of an error for which `.leaving(..)` is called.
fn left_by(call: &syn::ExprMethodCall) -> Option<String> {
    let class = match last(call.args.first()?)?.as_str() {
        "PartlyChanged" => "Unfinished",
        "Rewound" => "Rewound",
        _ => return None,
    };
    if call.method == "leaving" { heading(class) } else { None }
}

/// The exit code of a class.
fn heading(class: &str) -> Option<String> {
    let row =
        EXIT_CODES.iter().find(|row| row.class.is_some_and(|known| format!("{known:?}") == class));
    row.map(client::error::ExitCode::shown)
}

fn name_of(pattern: &syn::Pat) -> Option<String> {
    match pattern {
        syn::Pat::Ident(name) => Some(name.ident.to_string()),
        syn::Pat::Type(typed) => name_of(&typed.pat),
        _ => None,
    }
}

impl<'ast> Visit<'ast> for Messages {
    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        let parameter = function.sig.inputs.first().and_then(|input| match input {
            syn::FnArg::Typed(typed) => name_of(&typed.pat),
            syn::FnArg::Receiver(_) => None,
        });
        let body = syn::Expr::Block(syn::ExprBlock {
            attrs: Vec::new(),
            label: None,
            block: (*function.block).clone(),
        });
        self.closures.clear();
        if let Some(heading) = self.learn(parameter, &body) {
            let name = (self.own_crate.clone(), function.sig.ident.to_string());
            self.helpers.insert(name, heading);
        }
        self.known = self.constants.clone();
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.closures.clear();
        self.known = self.constants.clone();
        syn::visit::visit_impl_item_fn(self, function);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if let syn::Type::Path(path) = &*item.self_ty {
            let last = path.path.segments.last().map(|part| part.ident.to_string());
            self.own_type = last.unwrap_or_default();
        }
        syn::visit::visit_item_impl(self, item);
    }

    /// Texts of `thiserror`.
    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        if attribute.path().is_ident("error")
            && let Ok(text) = attribute.parse_args_with(|input: syn::parse::ParseStream<'_>| {
                let text: syn::LitStr = input.parse()?;
                let _rest: proc_macro2::TokenStream = input.parse()?;
                Ok(text)
            })
        {
            self.keep(CAUSE.to_owned(), vec![text.value()]);
        }
    }

    fn visit_item_const(&mut self, item: &'ast syn::ItemConst) {
        let text = texts(&item.expr, &self.known);
        self.constants.insert(item.ident.to_string(), text);
    }

    fn visit_local(&mut self, local: &'ast syn::Local) {
        if let (Some(name), Some(init)) = (name_of(&local.pat), &local.init) {
            if let syn::Expr::Closure(closure) = &*init.expr {
                let parameter = closure.inputs.first().and_then(name_of);
                if let Some(heading) = self.learn(parameter, &closure.body) {
                    self.closures.insert(name, heading);
                }
            } else {
                let texts = texts(&init.expr, &self.known);
                self.known.insert(name, texts);
            }
        }
        syn::visit::visit_local(self, local);
    }

    fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
        if let Some((heading, message)) = self.made(call) {
            let texts = texts(message, &self.known);
            self.keep(self.left.clone().unwrap_or(heading), texts);
        }
        syn::visit::visit_expr_call(self, call);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        let outer = std::mem::replace(&mut self.left, left_by(call));
        let heading = match call.method.to_string().as_str() {
            "warning" => Some(WARNING),
            "note" => Some(NOTE),
            _ => None,
        };
        if let (Some(heading), Some(message)) = (heading, call.args.first()) {
            let texts = texts(message, &self.known);
            self.keep(heading.to_owned(), texts);
        }
        syn::visit::visit_expr_method_call(self, call);
        self.left = outer;
    }
}

/// The index, made of the code.
fn index() -> String {
    let files: Vec<(String, syn::File)> = product()
        .into_iter()
        .filter(|(name, _)| !name.starts_with("certs/"))
        .map(|(name, text)| (name, syn::parse_file(&text).expect("a file that compiles")))
        .collect();
    let mut messages = Messages::default();
    // Helpers and constants may stand behind those that use them.
    for _ in 0..2 {
        for (name, file) in &files {
            name.split('/').next().unwrap_or_default().clone_into(&mut messages.own_crate);
            messages.visit_file(file);
        }
    }
    let mut all = messages.found;
    let mut page = String::from(
        "# Messages\n\nThe messages of both programs, by exit code. `{…}` stands for a value, or for a part that is \
         another entry. Behind a message, after a colon, stand its causes. This page is made of the code by \
         `make messages`.\n",
    );
    let codes = EXIT_CODES.iter().map(|row| (row.shown(), row.meaning.to_owned()));
    let others = [
        (REPLAN, "the run plans again; after three times it ends with exit code 5"),
        (NOT_POSSIBLE, "`auto` takes another one; insisting ends with exit code 6 or 7"),
        (REFUSED, "shown behind \"a request to the source failed\""),
        (CAUSE, "shown behind another message"),
        (WARNING, "the run goes on"),
        (NOTE, "the run goes on"),
        (RESULT, "exit code 0"),
    ];
    let others = others.iter().map(|(name, meaning)| ((*name).to_owned(), (*meaning).to_owned()));
    for (heading, meaning) in codes.chain(others) {
        let Some(texts) = all.remove(&heading) else {
            continue;
        };
        let number = heading.starts_with(|first: char| first.is_ascii_digit());
        let title = if number { format!("Exit code {heading}") } else { heading };
        page.push_str(&format!("\n## {title}: {meaning}\n\n"));
        for text in texts {
            page.push_str(&format!("- {}\n", text.replace('\n', " ")));
        }
    }
    page
}

#[test]
fn the_index_of_messages_is_current() {
    let path = root().join("docs/MESSAGES.md");
    let page = index();
    if std::env::var_os("PGREJOIN_WRITE_MESSAGES").is_some() {
        let mut file = fs::File::create(&path).unwrap();
        std::io::Write::write_all(&mut file, page.as_bytes()).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(written == page, "docs/MESSAGES.md is not what the code says: run make messages");
    assert!(
        page.lines().filter(|line| line.starts_with("- ")).count() > 150,
        "messages are missed"
    );
}
