#include "sanitize/rules.h"

#include <algorithm>
#include <stdexcept>

#include "core/rules/table.h"

namespace steadygrad::sanitize {
namespace {

RuleHyper defaults_of(RuleKind kind) {
  RuleHyper hyper;
  hyper.lr = 0.01;
  hyper.beta1 = 0.9;
  hyper.beta2 = 0.999;
  hyper.alpha = kind == RuleKind::asgd ? 0.75 : 0.99;
  hyper.rho = 0.9;
  hyper.lambd = 1e-2;
  hyper.t0 = 1;
  hyper.momentum_decay = 4e-3;
  hyper.etaminus = 0.5;
  hyper.etaplus = 1.2;
  hyper.step_size_min = 1e-6;
  hyper.step_size_max = 50;
  if (kind != RuleKind::sgd) hyper.eps = 1e-8;
  return hyper;
}

std::vector<RuleVariant> made() {
  std::vector<RuleVariant> variants;
  const auto add = [&](const char* name, RuleKind kind) -> RuleHyper& {
    variants.push_back({name, kind, defaults_of(kind)});
    return variants.back().hyper;
  };
  add("none", RuleKind::none);

  add("sgd", RuleKind::sgd);
  add("sgd with decay", RuleKind::sgd).weight_decay = 0.1;
  RuleHyper& damped = add("sgd with momentum", RuleKind::sgd);
  damped.momentum = 0.9;
  damped.dampening = 0.5;
  damped.maximize = true;
  RuleHyper& momentum = add("sgd with momentum and decay", RuleKind::sgd);
  momentum.momentum = 0.9;
  momentum.weight_decay = 0.1;
  RuleHyper& nesterov = add("sgd nesterov", RuleKind::sgd);
  nesterov.momentum = 0.9;
  nesterov.nesterov = true;

  add("adam", RuleKind::adam);
  add("adam with decay", RuleKind::adam).weight_decay = 0.1;
  add("adam amsgrad", RuleKind::adam).amsgrad = true;
  RuleHyper& decoupled = add("adamw", RuleKind::adam);
  decoupled.weight_decay = 0.1;
  decoupled.decoupled_weight_decay = true;
  RuleHyper& decoupled_amsgrad = add("adamw amsgrad", RuleKind::adam);
  decoupled_amsgrad.weight_decay = 0.1;
  decoupled_amsgrad.decoupled_weight_decay = true;
  decoupled_amsgrad.amsgrad = true;
  decoupled_amsgrad.maximize = true;

  add("adagrad", RuleKind::adagrad);
  RuleHyper& slower = add("adagrad with decays", RuleKind::adagrad);
  slower.lr_decay = 0.1;
  slower.weight_decay = 0.1;

  add("rmsprop", RuleKind::rmsprop);
  add("rmsprop centered", RuleKind::rmsprop).centered = true;
  add("rmsprop with momentum", RuleKind::rmsprop).momentum = 0.9;
  RuleHyper& all = add("rmsprop centered with momentum and decay", RuleKind::rmsprop);
  all.centered = true;
  all.momentum = 0.9;
  all.weight_decay = 0.1;

  for (const RuleEntry& rule : kRules) {
    const bool is_new = std::none_of(variants.begin(), variants.end(),
                                     [&](const RuleVariant& variant) { return variant.kind == rule.kind; });
    if (!is_new) continue;
    const std::string name(rule.name);
    add(name.c_str(), rule.kind);
    RuleHyper& decayed = add((name + " with decay").c_str(), rule.kind);
    decayed.weight_decay = 0.1;
    decayed.maximize = true;
  }
  return variants;
}

}  // namespace

const std::vector<RuleVariant>& rule_variants() {
  static const std::vector<RuleVariant> variants = made();
  return variants;
}

const RuleVariant& rule_variant(const std::string& name) {
  for (const RuleVariant& variant : rule_variants()) {
    if (variant.name == name) return variant;
  }
  throw std::runtime_error("no rule is named " + name);
}

}  // namespace steadygrad::sanitize
