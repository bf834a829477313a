// The update rules in all their variants.
#pragma once

#include <string>
#include <vector>

#include "core/rules/hyper.h"

namespace steadygrad::sanitize {

struct RuleVariant {
  std::string name;
  RuleKind kind = RuleKind::none;
  RuleHyper hyper;
};

const std::vector<RuleVariant>& rule_variants();

const RuleVariant& rule_variant(const std::string& name);

}  // namespace steadygrad::sanitize
